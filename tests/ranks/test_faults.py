"""What a group survives, what it leaves behind, and whom it lets in. Real processes, really killed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.random_weights import random_latent
from distributed import Cancelled, GroupError, JobError, RankGroup

ROOT = Path(__file__).resolve().parents[2]


LONG = (1, 32, 32, 6, 6)


@pytest.fixture(scope="module")
def expected(pair, vae):
    return pair.decode(random_latent(*LONG), vae)


def during(group: RankGroup, act) -> threading.Thread:
    """Call `act` once the decode in hand has shown progress."""

    def wait() -> None:
        limit = time.monotonic() + 60
        while time.monotonic() < limit and not any(
            rank["done"] and rank["state"] == "busy" for rank in group.status()["ranks"]
        ):
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("who", ["rank 0", "rank 1", "launcher"])
def test_a_killed_process_is_replaced_and_the_frames_are_the_same(pair, vae, expected, who):
    def kill() -> None:
        pid = pair._ranks.launcher.pid if who == "launcher" else pair.status()["ranks"][int(who[-1])]["pid"]
        os.kill(pid, signal.SIGKILL)

    before = {rank["pid"] for rank in pair.status()["ranks"]}
    killer = during(pair, kill)
    frames = pair.decode(random_latent(*LONG), vae)
    killer.join()
    assert torch.equal(frames, expected)
    assert pair.status()["state"] == "ready"
    assert before.isdisjoint(rank["pid"] for rank in pair.status()["ranks"])
    assert not any(psutil.pid_exists(pid) for pid in before)


def test_a_rank_killed_while_idle_is_replaced_at_the_next_decode(pair, vae):
    os.kill(pair.status()["ranks"][1]["pid"], signal.SIGKILL)
    time.sleep(1)
    assert pair.decode(random_latent(1, 32, 1, 1, 2), vae).shape == (1, 1, 16, 32, 3)


def test_a_stopped_rank_is_noticed_and_replaced(pair, vae, expected):
    stopper = during(pair, lambda: os.kill(pair.status()["ranks"][0]["pid"], signal.SIGSTOP))
    assert torch.equal(pair.decode(random_latent(*LONG), vae), expected)
    stopper.join()


def test_a_cancel_ends_the_decode_soon_and_keeps_the_ranks(pair, vae, expected):
    pids = [rank["pid"] for rank in pair.status()["ranks"]]
    cancelled_at = []

    def cancel() -> None:
        cancelled_at.append(time.monotonic())
        pair.cancel()

    thread = during(pair, cancel)
    with pytest.raises(Cancelled):
        pair.decode(random_latent(1, 32, 100, 6, 6), vae)
    assert time.monotonic() - cancelled_at[0] < 10
    thread.join()
    assert torch.equal(pair.decode(random_latent(*LONG), vae), expected)
    assert [rank["pid"] for rank in pair.status()["ranks"]] == pids


def test_a_timeout_ends_the_decode_and_keeps_the_ranks(pair, vae):
    pids = [rank["pid"] for rank in pair.status()["ranks"]]
    with pytest.raises(TimeoutError):
        pair.decode(random_latent(1, 32, 100, 6, 6), vae, timeout=1)
    pair.decode(random_latent(1, 32, 1, 1, 2), vae)
    assert [rank["pid"] for rank in pair.status()["ranks"]] == pids


def test_decodes_from_several_threads_queue_and_two_groups_work_side_by_side(pair, vae):
    results = {}
    with RankGroup(devices=["cpu"]) as other:
        threads = [
            threading.Thread(
                target=lambda i=i: results.update(
                    {i: (pair, other)[i % 2].decode(random_latent(1, 32, 2, 2, 3, seed=i), vae)}
                )
            )
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(4):
        torch.testing.assert_close(
            results[i], pair.decode(random_latent(1, 32, 2, 2, 3, seed=i), vae), atol=1e-5, rtol=0
        )


def test_strangers_are_turned_away_and_the_ranks_do_not_notice(pair, vae, caplog):
    address = pair._ranks._door.address
    assert address[0] == "127.0.0.1"
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff" + b"x" * 100, b"\x00\x00\x00\x05hello" * 3):
        with socket.create_connection(address, timeout=5) as stranger:
            stranger.sendall(words)
    slow = socket.create_connection(address, timeout=5)  # says nothing at all
    assert pair.decode(random_latent(1, 32, 1, 1, 2), vae).shape == (1, 1, 16, 32, 3)
    slow.close()
    assert sum("stranger" in record.message for record in caplog.records) <= 1


def test_files_of_a_group_are_its_owners_alone_and_gone_when_it_stops(vae):
    group = RankGroup(devices=["cpu"])
    group.start(wait=True)
    folder = group._ranks.folder
    for path in [folder, *folder.glob("key"), *folder.glob("rank-*.log")]:
        assert path.stat().st_mode & 0o077 == 0, path
    group.stop()
    assert not folder.exists() and group.status()["state"] == "stopped"
    assert group.decode(random_latent(1, 32, 1, 1, 1), vae).shape[1] == 1, "a stopped group starts again when needed"
    group.stop()


def test_ranks_leave_when_their_controller_is_killed():
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from distributed import RankGroup\n"
        "if __name__ == '__main__':\n"
        "    group = RankGroup(devices=['cpu', 'cpu']); group.start(wait=True)\n"
        "    print(*(rank['pid'] for rank in group.status()['ranks']), group._ranks.folder, flush=True)\n"
        "    time.sleep(100)\n"
    )
    controller = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE, text=True)
    *pids, folder = controller.stdout.readline().split()
    controller.kill()
    controller.wait()
    controller.stdout.close()
    limit = time.monotonic() + 10
    while time.monotonic() < limit and (Path(folder).exists() or any(psutil.pid_exists(int(pid)) for pid in pids)):
        time.sleep(0.1)
    assert not any(psutil.pid_exists(int(pid)) for pid in pids)
    assert not Path(folder).exists()


def test_a_group_that_cannot_start_says_why_and_leaves_nothing():
    group = RankGroup(devices=["cpu", "cpu"], worker="distributed.no_such_module", start_timeout=60)
    with pytest.raises(GroupError, match="launcher ended with exit code"):
        group.start(wait=True)
    assert group.status()["state"] == "failed" and not group._ranks.folder.exists()
    group.stop()


def test_memory_that_does_not_suffice_is_told_with_the_numbers(pair, vae):
    pids = [rank["pid"] for rank in pair.status()["ranks"]]
    with pytest.raises(JobError, match=r"needs .* GiB and .* GiB can be used"):
        pair.decode(random_latent(1, 32, 4, 4, 4), vae, memory=2**20)
    assert [rank["pid"] for rank in pair.status()["ranks"]] == pids
