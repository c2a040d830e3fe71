"""Ranks authenticate each other, so a program of another account that connects is never accepted as a rank."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.random_weights import random_latent
from distributed import GroupError, RankGroup
from distributed.ranks.peers import PROOF_SECONDS

ROOT = Path(__file__).resolve().parents[2]
STRANGER = """
import os, socket, struct, sys
print("ready", flush=True)
known, kept = set(), []
while True:
    for line in open("/proc/net/tcp").readlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if state == "0A" and address.startswith("0100007F:") and address not in known:
            known.add(address)
            for pair in range(4):  # gloo numbers its connections, and a client sends the number
                try:
                    caller = socket.create_connection(("127.0.0.1", int(address[9:], 16)), 1)
                    caller.sendall(os.urandom(4096) if sys.argv[1] == "garbage" else struct.pack("q", pair))
                    kept.append(caller)
                except OSError:
                    pass
"""


@pytest.fixture
def stranger(request):
    """A program of another account that connects to each new listening port on loopback, of whichever test."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if os.geteuid() or not python or not Path("/proc/net/tcp").exists():
        pytest.skip("needs root to become another account, a system's Python and Linux")
    become = ["setpriv", "--reuid=61234", "--regid=61234", "--clear-groups"]
    process = subprocess.Popen([*become, python, "-c", STRANGER, request.param], stdout=subprocess.PIPE, cwd="/")
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def connect_with_keys(folder: Path, keys: list[str]) -> list[str]:
    """Start a rank on gloo for each key and return what each prints: the seconds that it took and the result."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.proving", str(rank), str(len(keys)), str(folder), key],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank, key in enumerate(keys)
    ]
    try:
        return [rank.stdout.readline() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_ranks_with_the_same_key_connect(tmp_path):
    assert [line.split()[1] for line in connect_with_keys(tmp_path, ["key", "key"])] == ["connected"] * 2


@pytest.mark.alone
def test_ranks_with_different_keys_refuse_each_other_within_the_time_limit(tmp_path):
    for rank, line in enumerate(connect_with_keys(tmp_path, ["key", "another key"])):
        seconds, error = line.split(maxsplit=1)
        assert error == f"ConnectionError: Another program is connected in place of rank {1 - rank}.\n"
        assert float(seconds) < PROOF_SECONDS


def listening(group: RankGroup) -> list[str]:
    pids = [rank["pid"] for rank in group.status()["ranks"]]
    return [c.laddr for pid in pids for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN]


def test_connected_ranks_do_not_listen_and_can_create_process_groups(vae):
    with RankGroup("cpu,cpu,cpu") as group:
        assert listening(group) == []
        whole, small = random_latent(1, 32, 2, 3, 6), random_latent(1, 32, 2, 2, 4)
        expected = group.decode(whole, vae)
        assert group.decode(small, vae).isfinite().all()  # on two ranks, in a process group of their own
        assert listening(group) == []
        assert torch.equal(group.decode(whole, vae), expected)


def test_the_group_restarts_if_ranks_cannot_connect_for_a_further_process_group(vae):
    notices = []
    with RankGroup("cpu,cpu,cpu", worker="tests.ranks.unconnectable") as group:
        whole = random_latent(1, 32, 2, 3, 6)  # on all ranks, in the process group that exists
        expected, before = group.decode(whole, vae), group.status()["ranks"]
        with pytest.raises(GroupError):
            group.decode(random_latent(1, 32, 2, 2, 4), vae, notice=notices.append)
        assert len(notices) == 1 and "Restarting the rank group and retrying the decode." in notices[0]
        assert torch.equal(group.decode(whole, vae), expected)
        assert {rank["pid"] for rank in before}.isdisjoint(rank["pid"] for rank in group.status()["ranks"])


@pytest.mark.alone
@pytest.mark.parametrize("stranger", ["calls", "garbage"], indirect=True)
def test_a_group_decodes_or_fails_while_another_account_connects_and_starts_afterwards(vae, stranger):
    """Another account can prevent a start. It cannot become a rank, and a later start succeeds."""
    latent = random_latent(1, 32, 2, 2, 4)
    group = RankGroup("cpu,cpu,cpu", start_timeout=60)
    try:
        with contextlib.suppress(GroupError):
            assert group.decode(latent, vae).isfinite().all()
            assert listening(group) == []
        stranger.kill()
        stranger.wait()
        assert group.decode(latent, vae).isfinite().all()
        assert listening(group) == []
    finally:
        group.stop()


@pytest.mark.alone
@pytest.mark.parametrize("stranger", ["calls", "garbage"], indirect=True)
def test_a_group_decodes_or_fails_in_time_if_another_account_connects_before_the_other_ranks(vae, stranger):
    """The ranks connect seconds after each other, so the program has enough time to connect in place of a rank."""
    begun = time.monotonic()
    try:
        with RankGroup("cpu,cpu,cpu", worker="tests.ranks.dawdling", start_timeout=40) as group:
            assert group.decode(random_latent(1, 32, 2, 2, 4), vae).isfinite().all()
    except GroupError as error:
        assert "rank" in str(error)
    assert time.monotonic() - begun < 60
    assert stranger.poll() is None
