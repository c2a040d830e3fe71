"""What a group survives, what it leaves behind, and whom it lets in. Real processes, really killed."""

import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.random_weights import random_latent
from distributed import Cancelled, GroupError, JobError, RankGroup
from distributed.ranks import processes as launch
from tests.ranks.moments import during, until

ROOT = Path(__file__).resolve().parents[2]


LONG = (1, 32, 96, 6, 6)


@pytest.fixture(scope="module")
def expected(pair, vae):
    return pair.decode(random_latent(*LONG), vae)


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


def test_a_stopped_rank_is_noticed_and_replaced(pair, vae, expected):
    before, told = {rank["pid"] for rank in pair.status()["ranks"]}, []
    stopper = during(pair, lambda: os.kill(pair.status()["ranks"][0]["pid"], signal.SIGSTOP))
    assert torch.equal(pair.decode(random_latent(*LONG), vae, notice=told.append), expected)
    stopper.join()
    assert "rank 0 (cpu) has not been heard of for" in told[0]
    assert before.isdisjoint(rank["pid"] for rank in pair.status()["ranks"])


def test_a_cancel_ends_the_decode_soon_and_keeps_the_ranks(pair, vae, expected):
    pids = [rank["pid"] for rank in pair.status()["ranks"]]
    cancelled_at = []

    def cancel() -> None:
        cancelled_at.append(time.monotonic())
        pair.cancel()

    thread = during(pair, cancel)
    with pytest.raises(Cancelled):
        pair.decode(random_latent(1, 32, 200, 6, 6), vae)
    assert time.monotonic() - cancelled_at[0] < 10
    thread.join()
    assert torch.equal(pair.decode(random_latent(*LONG), vae), expected)
    assert [rank["pid"] for rank in pair.status()["ranks"]] == pids


def test_a_timeout_ends_the_decode_and_keeps_the_ranks(pair, vae):
    pids = [rank["pid"] for rank in pair.status()["ranks"]]
    with pytest.raises(TimeoutError):
        pair.decode(random_latent(1, 32, 200, 6, 6), vae, timeout=1)
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


def replay(address: tuple[str, int], key: bytes) -> None:
    """Answer the second challenge with what was right for the first."""
    said = []

    class Recorder(Connection):
        def send_bytes(self, buf, *args) -> None:
            said.append(bytes(buf))
            super().send_bytes(buf, *args)

    def call() -> Recorder:
        connection = Client(address)
        return Recorder(os.dup(connection.fileno()))

    with call() as first:
        answer_challenge(first, key)
    with call() as second:
        second.recv_bytes(256)
        second.send_bytes(said[0])
        if second.recv_bytes(256) != b"#WELCOME#":
            raise AuthenticationError("refused")


def test_strangers_are_turned_away_and_the_ranks_do_not_notice(pair, vae, caplog):
    door = pair._ranks._door
    assert door.address[0] == "127.0.0.1"
    pids = [rank["pid"] for rank in pair.status()["ranks"]]
    door._warned = False
    garbage = (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff" + b"x" * 100, b"\x00\x00\x00\x05hello" * 3)
    for words in (*garbage, struct.pack("!iQ", -1, 4 * 2**30)):  # the last announces four gigabytes
        with socket.create_connection(door.address, timeout=5) as stranger:
            stranger.sendall(words)
    for key in (b"", b"wrong", os.urandom(32)):
        with pytest.raises((AuthenticationError, EOFError, OSError)):
            Client(door.address, authkey=key)
    with pytest.raises((AuthenticationError, EOFError, OSError)):
        replay(door.address, (pair._ranks.folder / "key").read_bytes())
    slow = [socket.create_connection(door.address, timeout=5) for _ in range(20)]  # say nothing at all
    assert pair.decode(random_latent(1, 32, 1, 1, 2), vae).shape == (1, 1, 16, 32, 3)
    for connection in slow:
        connection.close()
    assert sum("stranger" in record.message for record in caplog.records) == 1
    assert [rank["pid"] for rank in pair.status()["ranks"]] == pids


def test_files_of_a_group_are_its_owners_alone_and_gone_when_it_stops(vae):
    group = RankGroup(devices=["cpu"])
    group.start(wait=True)
    folder = group._ranks.folder
    for path in [folder, folder / "key"]:
        assert path.stat().st_mode & 0o077 == 0, path
    group.stop()
    assert not folder.exists() and group.status()["state"] == "stopped"
    assert group.decode(random_latent(1, 32, 1, 1, 1), vae).shape[1] == 1, "a stopped group starts again when needed"
    group.stop()


def test_no_file_of_a_group_holds_a_pickle(pair, vae):
    """What could be written by a stranger must not be code; pickles are known by their first bytes, base64 or not."""
    pair.decode(random_latent(1, 32, 1, 1, 2), vae)
    files = [file for file in pair._ranks.folder.rglob("*") if file.is_file()]
    assert {"key", "rendezvous"} <= {file.name for file in files}
    for file in files:
        assert not any(mark in file.read_bytes() for mark in (b"\x80\x04\x95", b"gASV")), file.name


@pytest.mark.parametrize("forks", [False, True])
def test_ranks_leave_when_their_controller_is_killed(forks):
    """Also where a child of its own, forked, holds its connections open."""
    code = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from distributed import RankGroup\n"
        "if __name__ == '__main__':\n"
        "    group = RankGroup(devices=['cpu', 'cpu']); group.start(wait=True)\n"
        "    child = len(sys.argv) > 2 and os.fork()\n"
        "    if child or len(sys.argv) == 2:\n"
        "        pids = [rank['pid'] for rank in group.status()['ranks']]\n"
        "        print(child, *pids, group._ranks.folder, flush=True)\n"
        "    time.sleep(100)\n"
    )
    command = [sys.executable, "-c", code, str(ROOT), *["fork"] * forks]
    controller = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child, *pids, folder = controller.stdout.readline().split()
    controller.kill()
    controller.wait()
    controller.stdout.close()
    try:
        assert until(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids), 10)
        assert until(lambda: not Path(folder).exists(), 1)
    finally:
        if forks:
            os.kill(int(child), signal.SIGKILL)


def test_a_group_that_cannot_start_says_why_and_leaves_nothing():
    group = RankGroup(devices=["cpu", "cpu"], worker="distributed.no_such_module", start_timeout=60)
    with pytest.raises(GroupError, match="launcher ended with exit code"):
        group.start(wait=True)
    assert group.status()["state"] == "failed"
    group.stop()


def test_memory_that_does_not_suffice_is_told_with_the_numbers(pair, vae):
    pids = [rank["pid"] for rank in pair.status()["ranks"]]
    with pytest.raises(JobError, match=r"needs .* GiB and .* GiB can be used"):
        pair.decode(random_latent(1, 32, 4, 4, 4), vae, memory=2**20)
    assert [rank["pid"] for rank in pair.status()["ranks"]] == pids


def test_a_process_that_dies_idle_is_noticed_and_replaced_with_nobody_asking(pair, vae):
    pair.decode(random_latent(1, 32, 1, 1, 2), vae)
    before = {rank["pid"] for rank in pair.status()["ranks"]}
    os.kill(max(before), signal.SIGKILL)
    assert until(lambda: pair.status()["state"] == "recovering", 2), "death was not noticed within two seconds"
    assert until(lambda: pair.status()["state"] == "ready", 60)
    assert before.isdisjoint(rank["pid"] for rank in pair.status()["ranks"])
    assert pair.decode(random_latent(1, 32, 1, 1, 2), vae).shape == (1, 1, 16, 32, 3)


def test_a_process_that_dies_before_it_was_ever_used_is_replaced_too(vae):
    with RankGroup(["cpu"]) as group:
        os.kill(group.status()["ranks"][0]["pid"], signal.SIGKILL)
        assert until(lambda: group.status()["state"] == "recovering", 2)
        assert until(lambda: group.status()["state"] == "ready", 60)


def test_progress_is_told_as_a_change_and_starts_anew_with_each_job(pair, vae):
    pair.decode(random_latent(1, 32, 1, 1, 2), vae)
    told = []
    pair.on_change = lambda: told.append(pair.status())
    try:
        pair.decode(random_latent(1, 32, 32, 6, 6), vae)
    finally:
        pair.on_change = lambda: None
    busy = [rank for status in told if status["state"] == "busy" for rank in status["ranks"] if rank["state"] == "busy"]
    assert busy[0]["done"] == busy[0]["total"] == 0
    assert any(0 < rank["done"] < rank["total"] for rank in busy)


def test_what_listens_may_fail_and_the_decode_does_not(pair, vae):
    def fail() -> None:
        raise RuntimeError("whoever listens is out of order")

    pair.on_change = fail
    try:
        assert pair.decode(random_latent(1, 32, 1, 1, 2), vae).shape == (1, 1, 16, 32, 3)
    finally:
        pair.on_change = lambda: None


def test_an_interruption_while_a_job_is_sent_costs_no_later_decode(vae, monkeypatch):
    send = launch.Ranks.send

    def interrupted(ranks, type, raw=None, **fields) -> None:
        if type == "job":
            monkeypatch.undo()
            raise KeyboardInterrupt
        send(ranks, type, raw, **fields)

    with RankGroup(["cpu"]) as group:
        monkeypatch.setattr(launch.Ranks, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            group.decode(random_latent(1, 32, 1, 1, 2), vae)
        assert group.decode(random_latent(1, 32, 1, 1, 2), vae, timeout=60).shape == (1, 1, 16, 32, 3)


def test_a_start_for_which_something_is_lacking_fails_in_words_and_leaves_nothing(monkeypatch, temporary):
    def lack(*args, **options) -> None:
        raise RuntimeError("can't start new thread")

    group, before = RankGroup(["cpu"]), set(temporary.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(launch, "Door", lack)
        with pytest.raises(GroupError, match="cannot be started: can't start new thread"):
            group.start(wait=True)
    assert set(temporary.iterdir()) == before
    group.start(wait=True)
    group.stop()


def test_a_rank_that_computes_for_long_does_not_hang(vae):
    told, first, begun = [], [], time.monotonic()

    def look(done: int, total: int) -> None:
        if done and not first:
            first.append(time.monotonic() - begun)
            group.cancel()

    with RankGroup(["cpu", "cpu"], stall_timeout=2) as group, pytest.raises(Cancelled):
        begun = time.monotonic()
        group.decode(random_latent(1, 32, 9, 24, 30), vae, progress=look, notice=told.append)
    assert told == []
    assert first[0] > 2.5, "there was progress too soon to show anything"


def test_a_rank_that_has_nothing_to_do_but_wait_for_others_does_not_hang(vae):
    """There is one tile, so one of the ranks has none."""
    told = []
    with RankGroup(["cpu", "cpu"], stall_timeout=2) as group:
        begun = time.monotonic()
        group.decode(random_latent(1, 32, 16, 16, 16), vae, "tiled", notice=told.append)
    assert told == []
    assert time.monotonic() - begun > 2.5, "it was over too soon to show anything"


def test_a_door_without_descriptors_rests_and_closes():
    code = (
        "import os, resource, socket, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from distributed.ranks.protocol import Door\n"
        "door = Door(b'key', print); caller = socket.socket()\n"
        "most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir('/proc/self/fd'))), most))\n"
        "while True:\n"
        "    try: os.dup(0)\n"
        "    except OSError: break\n"
        "caller.connect(door.address); before = time.process_time(); time.sleep(2)\n"
        "used = time.process_time() - before; begun = time.monotonic(); door.close()\n"
        "print(used < 0.5, time.monotonic() - begun < 5)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE, text=True, timeout=60)
    assert ended.stdout.split() == ["True", "True"]


def test_a_rank_that_is_stopped_before_a_large_latent_cannot_hold_up_a_cancel(vae):
    with RankGroup(devices=["cpu"]) as group:
        group.decode(random_latent(1, 32, 1, 1, 2), vae)
        os.kill(group.status()["ranks"][0]["pid"], signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            group.decode(torch.zeros(1, 32, 31, 90, 90), vae, cancelled=lambda: time.monotonic() - begun > 1)
        assert time.monotonic() - begun < 30
        assert group.decode(random_latent(1, 32, 1, 1, 2), vae).shape == (1, 1, 16, 32, 3)


def test_every_change_of_state_is_told_to_whoever_listens(vae):
    told = []
    group = RankGroup(["cpu"])
    group.on_change = lambda: told.append(group.status()["state"])
    group.decode(random_latent(1, 32, 1, 1, 2), vae)
    os.kill(group.status()["ranks"][0]["pid"], signal.SIGKILL)
    assert until(lambda: "recovering" in told and told[-1] == "ready", 60)
    os.kill(group.status()["ranks"][0]["pid"], signal.SIGKILL)  # again, before it has decoded anything
    assert until(lambda: told[-1] == "failed", 5)
    group.stop()
    changes = [state for state, before in zip(told, [None, *told], strict=False) if state != before]
    assert changes == ["starting", "ready", "busy", "ready", "recovering", "ready", "failed", "stopped"]


def test_stop_during_start_leaves_no_thread_and_no_process(vae):
    before = set(threading.enumerate())
    group = RankGroup(devices=["cpu", "cpu"])
    group.start()
    assert until(lambda: group._ranks is not None, 10)
    launcher = group._ranks.launcher
    group.stop()
    assert launcher.poll() is not None
    assert until(lambda: set(threading.enumerate()) <= before, 5)
    group.start(wait=True)
    assert group.status()["state"] == "ready"
    group.stop()


def test_a_group_that_is_stopped_before_its_preload_stays_stopped(vae):
    group = RankGroup(["cpu"])
    with group._decoding:  # so that the preload waits for its turn
        group.preload(vae)
        group.start(wait=True)
        group.stop()
    assert until(lambda: not any(thread.name == "hv15-preload" for thread in threading.enumerate()), 10)
    assert group.status()["state"] == "stopped"


def test_a_cancel_while_the_group_starts_is_heard_at_once_and_the_group_comes_up(vae):
    group = RankGroup(devices=["cpu", "cpu"])
    with pytest.raises(Cancelled):
        group.decode(random_latent(1, 32, 1, 1, 2), vae, cancelled=lambda: True)
    assert group.status()["state"] == "starting"
    group.start(wait=True)
    group.stop()


def test_nothing_listens_beyond_loopback(pair):
    processes = [psutil.Process(pair._ranks.launcher.pid)]
    processes += [psutil.Process(rank["pid"]) for rank in pair.status()["ranks"]]
    for process in processes:
        listening = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert set(listening) <= {"127.0.0.1"}, process.cmdline()


def test_frames_that_are_held_over_a_stop_free_their_memory_when_dropped(vae):
    def shared() -> int:
        return sum("hv15-frames" in str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())

    gc.collect()
    before = shared()
    with RankGroup(devices=["cpu"]) as group:
        frames = group.decode(random_latent(1, 32, 1, 1, 2), vae)
    assert shared() > before and frames.isfinite().all()
    del frames
    gc.collect()
    assert shared() == before


def test_idle_ranks_use_no_cpu(pair, vae):
    pair.decode(random_latent(1, 32, 1, 1, 2), vae)

    def used() -> float:
        pids = [pair._ranks.launcher.pid, *(rank["pid"] for rank in pair.status()["ranks"])]
        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)

    before = used()
    time.sleep(3)
    assert used() - before < 0.15  # of 9 seconds


@pytest.fixture
def deed(tmp_path, monkeypatch):
    """The file that tells misbehaving ranks what to do."""
    path = tmp_path / "deed"
    monkeypatch.setenv("HV15_TEST_DEED", str(path))
    return path


@pytest.fixture
def rogues(deed, tmp_path):
    """Two ranks that may misbehave."""
    with RankGroup(["cpu", "cpu"], worker="tests.ranks.misbehaving", logs=tmp_path / "logs", stall_timeout=5) as group:
        yield group


def test_a_rank_that_hangs_but_lives_is_noticed_by_its_lack_of_progress(rogues, deed, vae):
    expected = rogues.decode(random_latent(1, 32, 4, 2, 4), vae)
    deed.write_text("hang 1 once")
    told = []
    assert torch.equal(rogues.decode(random_latent(1, 32, 4, 2, 4), vae, notice=told.append), expected)
    assert "made no progress for" in told[0] and "run again" in told[0]


def test_an_error_of_one_rank_alone_fails_the_job_and_the_group_comes_back(rogues, deed, vae):
    deed.write_text("raise 1")
    begun = time.monotonic()
    with pytest.raises(JobError, match=r"Rank 1 \(cpu\): RuntimeError: a deed of rank 1"):
        rogues.decode(random_latent(1, 32, 4, 2, 4), vae)
    assert time.monotonic() - begun < 10
    deed.unlink()
    assert rogues.decode(random_latent(1, 32, 4, 2, 4), vae).isfinite().all()


def test_what_fails_before_the_decode_on_one_rank_fails_on_all_and_they_stay(rogues, deed, vae):
    pids = [rank["pid"] for rank in rogues.status()["ranks"]]
    deed.write_text("refuse 1")
    with pytest.raises(JobError, match=r"Rank 1 \(cpu\): ValueError: a checkpoint that"):
        rogues.decode(random_latent(1, 32, 4, 2, 4), vae)
    deed.unlink()
    assert rogues.decode(random_latent(1, 32, 4, 2, 4), vae).isfinite().all()
    assert [rank["pid"] for rank in rogues.status()["ranks"]] == pids


def test_memory_that_runs_out_in_mid_decode_has_it_run_again_in_less(rogues, deed, vae):
    expected = rogues.decode(random_latent(1, 32, 4, 2, 4), vae)
    deed.write_text("memory 1 once")
    told = []
    frames = rogues.decode(random_latent(1, 32, 4, 2, 4), vae, notice=told.append)
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)  # smaller steps round otherwise
    assert len(told) == 1 and "GiB can be used" in told[0] and "run again in" in told[0]


def test_memory_that_runs_out_on_one_rank_of_a_grid_harms_no_other(deed, vae):
    """Its neighbours to the side and below wait for borders of it that would come out of turn."""
    told = []
    with RankGroup(["cpu"] * 4, worker="tests.ranks.misbehaving", stall_timeout=20) as group:
        expected = group.decode(random_latent(1, 32, 40, 4, 4), vae)
        deed.write_text("memory 1 once")
        frames = group.decode(random_latent(1, 32, 40, 4, 4), vae, notice=told.append)
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)
    assert len(told) == 1 and "GiB can be used" in told[0] and "run again in" in told[0]


def test_memory_that_runs_out_while_weights_are_loaded_is_told_with_the_numbers(rogues, deed, vae):
    pids = [rank["pid"] for rank in rogues.status()["ranks"]]
    deed.write_text("load 1 once")
    with pytest.raises(JobError, match=r"needs \d.* GiB and \d.* GiB can be used"):
        rogues.decode(random_latent(1, 32, 4, 2, 4), vae)
    assert rogues.decode(random_latent(1, 32, 4, 2, 4), vae).isfinite().all()
    assert [rank["pid"] for rank in rogues.status()["ranks"]] == pids


def test_one_rank_that_runs_out_of_memory_stays_up(deed, vae):
    with RankGroup(["cpu"], worker="tests.ranks.misbehaving") as group:
        pids = [rank["pid"] for rank in group.status()["ranks"]]
        deed.write_text("memory 0 once")
        assert group.decode(random_latent(1, 32, 4, 2, 4), vae).isfinite().all()
        deed.write_text("memory 0")
        with pytest.raises(JobError, match="GiB can be used"):
            group.decode(random_latent(1, 32, 4, 2, 4), vae)
        assert [rank["pid"] for rank in group.status()["ranks"]] == pids


def test_a_rank_that_dies_twice_ends_the_decode_with_its_name_code_log_and_last_words(rogues, deed, vae, tmp_path):
    deed.write_text("exit 1")
    with pytest.raises(GroupError) as caught:
        rogues.decode(random_latent(1, 32, 4, 2, 4), vae)
    words = str(caught.value)
    assert "rank 1 (cpu)" in words and "exit code 7" in words and "last words of a rank" in words
    log = Path(words.split("Its log, ")[1].split(", ends")[0])
    assert log.is_relative_to(tmp_path / "logs") and "last words" in log.read_text()
    assert rogues.status()["state"] == "failed" and "exit code 7" in rogues.status()["error"]
    deed.unlink()
    assert rogues.decode(random_latent(1, 32, 4, 2, 4), vae).isfinite().all()


def test_logs_are_kept_private_and_from_growing(rogues, deed, vae, tmp_path):
    deed.write_text("chatter 0 once")
    rogues.decode(random_latent(1, 32, 4, 2, 4), vae)
    (run,) = (tmp_path / "logs").iterdir()
    assert until(lambda: (run / "rank-0.old.log").exists(), 5)
    assert (run / "rank-0.log").stat().st_size < 2**20
    for path in [run, *run.iterdir()]:
        assert path.stat().st_mode & 0o077 == 0, path
    rogues.stop()
    assert (run / "rank-0.old.log").exists()


def test_ranks_that_never_come_up_are_given_up(deed, vae):
    deed.write_text("late 1")
    group = RankGroup(["cpu", "cpu"], worker="tests.ranks.misbehaving", start_timeout=8)
    with pytest.raises(GroupError, match=r"rank 1 \(cpu\).* did not come up within 8 seconds"):
        group.start(wait=True)
    group.stop()


@pytest.mark.parametrize("seconds", [0.0, 0.7, 2.0])
def test_a_controller_that_is_killed_while_ranks_start_leaves_nothing(seconds):
    """Its orphans fall to whoever takes orphans in, such as a user's session. That process must not be harmed."""
    controller = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from distributed import RankGroup\n"
        "group = RankGroup(devices=['cpu', 'cpu']); group.start()\n"
        "while not group._ranks: time.sleep(0.01)\n"
        "print(group._ranks.folder, flush=True)\n"
        "time.sleep(100)\n"
    )
    session = (
        "import ctypes, os, subprocess, sys, time\n"
        "ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)\n"  # PR_SET_CHILD_SUBREAPER
        "command = [sys.executable, '-c', sys.argv[2], sys.argv[1]]\n"
        "controller = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)\n"
        "folder = controller.stdout.readline().strip()\n"
        "time.sleep(float(sys.argv[3])); controller.kill(); limit = time.monotonic() + 20\n"
        "while time.monotonic() < limit:\n"
        "    try: os.waitpid(-1, os.WNOHANG)\n"
        "    except ChildProcessError: print(folder); break\n"
        "    time.sleep(0.05)\n"
    )
    command = [sys.executable, "-c", session, str(ROOT), controller, str(seconds)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert ended.returncode == 0, "the session was killed"
    assert ended.stdout, "processes are left"
    assert not Path(ended.stdout.strip()).exists()
