"""Shared memory can be opened by the ranks and by no other account, even if /proc entries cannot be read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.ranks.buffers import SharedBuffers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="on other systems shared memory is a file")
ROOT = Path(__file__).resolve().parents[2]


def test_other_accounts_cannot_open_a_buffer_even_with_its_name():
    if os.geteuid() != 0:
        pytest.skip("needs root to become another account")
    pool = SharedBuffers()
    frames, shared = pool.allocate((1, 1, 16, 16, 3))
    code = (
        "import sys; from distributed.ranks.shared_memory import open_shared; open_shared(sys.argv[1]); print('opened')"
    )

    def open_it(*prefix: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(ROOT), *sys.path])
        command = [*prefix, sys.executable, "-c", code, shared.place]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)

    assert open_it().stdout == "opened\n"
    refused = open_it("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    assert refused.returncode and refused.stdout == "", refused.stderr
    assert any(error in refused.stderr for error in ("BrokenPipe", "ConnectionReset", "no longer shares"))
    assert frames.sum() == 0
    del frames
    pool.trim()


DECODE = """
import ctypes, os, subprocess, sys
from benchmarks.random_weights import random_latent
from distributed import RankGroup
from distributed.vae.checkpoint import decoder_tensors, open_checkpoint
if __name__ == "__main__":
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: same effect as an interpreter with capabilities
    if subprocess.run(["readlink", f"/proc/{os.getpid()}/fd/0"], capture_output=True).returncode == 0:
        sys.exit("the /proc entries can be read")
    weights = {f"decoder.{key}": value for key, value in decoder_tensors(open_checkpoint(sys.argv[1])).items()}
    with RankGroup("cpu") as group:
        latent = random_latent(1, 32, 2, 2, 2)
        assert (group.decode(latent, weights) == group.decode(latent, sys.argv[1])).all()
    print("the same frames")
"""


def test_ranks_open_frames_and_weights_if_the_controllers_proc_entries_cannot_be_read(vae):
    # Root can read every entry unless it drops its capabilities.
    unprivileged = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    ended = subprocess.run(
        [*unprivileged, sys.executable, "-c", DECODE, vae], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout == "the same frames\n", ended.stderr[-3000:]
