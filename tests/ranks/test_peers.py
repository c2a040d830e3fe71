"""Another account that connects to ranks while they meet is never taken for one of them, and cannot stay."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.random_weights import random_latent
from distributed import GroupError, RankGroup

STRANGER = """
import os, socket, struct, sys
print("ready", flush=True)
known, kept = set(), []
while True:
    for line in open("/proc/net/tcp").readlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if state == "0A" and address.startswith("0100007F:") and address not in known:
            known.add(address)
            for pair in range(4):  # gloo counts its connections, and a caller says which one it is
                try:
                    caller = socket.create_connection(("127.0.0.1", int(address[9:], 16)), 1)
                    caller.sendall(os.urandom(4096) if sys.argv[1] == "garbage" else struct.pack("q", pair))
                    kept.append(caller)
                except OSError:
                    pass
"""


@pytest.fixture
def stranger(request):
    """Another account's program that connects to whatever begins to listen on loopback."""
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


def listening(group: RankGroup) -> list[str]:
    pids = [rank["pid"] for rank in group.status()["ranks"]]
    return [c.laddr for pid in pids for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN]


def test_ranks_that_have_met_listen_nowhere_and_go_on(vae):
    with RankGroup("cpu,cpu,cpu") as group:
        assert listening(group) == []
        expected = group.decode(random_latent(1, 32, 2, 2, 4), vae)
        few = group.decode(random_latent(1, 32, 2, 1, 2), vae)  # by two of the three, in a group of their own
        assert few.isfinite().all() and listening(group) == []
        assert torch.equal(group.decode(random_latent(1, 32, 2, 2, 4), vae), expected)


@pytest.mark.parametrize("stranger", ["calls", "garbage"], indirect=True)
def test_a_group_starts_while_a_stranger_connects_to_whatever_listens(vae, stranger):
    with RankGroup("cpu,cpu,cpu", start_timeout=60) as group:
        assert group.decode(random_latent(1, 32, 2, 2, 4), vae).isfinite().all()
        assert listening(group) == []


@pytest.mark.parametrize("stranger", ["calls", "garbage"], indirect=True)
def test_a_stranger_that_was_connected_in_place_of_a_rank_is_noticed_before_anything_is_decoded(vae, stranger):
    """Ranks that connect seconds after each other leave it all the time that it needs."""
    begun = time.monotonic()
    try:
        with RankGroup("cpu,cpu,cpu", worker="tests.ranks.dawdling", start_timeout=40) as group:
            assert group.decode(random_latent(1, 32, 2, 2, 4), vae).isfinite().all()
    except GroupError as error:
        assert "rank" in str(error)
    assert time.monotonic() - begun < 60
    assert stranger.poll() is None
