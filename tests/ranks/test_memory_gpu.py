"""A GPU whose memory other processes use. The weights are random and of the real size."""

import subprocess
import sys

import pytest
import torch

from benchmarks.random_weights import random_latent
from distributed import JobError, RankGroup

pytestmark = pytest.mark.gpu

HOG = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(float(sys.argv[1]) * 2**30), dtype=torch.uint8, device="cuda")
print("full", flush=True)
sys.stdin.read()
"""


class Hog:
    """A context in which another process allocates all memory of the GPU except `gib` GiB."""

    def __init__(self, gib: float) -> None:
        self.gib = gib

    def __enter__(self) -> None:
        command = [sys.executable, "-c", HOG, str(self.gib)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "full\n"

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def test_a_decode_adapts_to_the_gpu_memory_that_another_process_leaves(full):
    latent = random_latent(1, 32, 5, 30, 53)
    with RankGroup("cuda:0") as group:
        expected = group.decode(latent, full).clone()

        def check(frames: torch.Tensor) -> None:
            """Compare up to rounding: steps differ, and cuDNN may select an algorithm that needs less workspace."""
            assert (frames - expected).norm() / expected.norm() < 0.02

        pids = [rank["pid"] for rank in group.status()["ranks"]]
        for gib in (8, 5):
            group.release()
            with Hog(gib):
                check(group.decode(latent, full))
        group.release()
        with Hog(2), pytest.raises(JobError, match=r"needs .* GiB is available \(other processes hold \d\d"):
            group.decode(latent, full)
        assert torch.equal(group.decode(latent, full), expected)
        assert [rank["pid"] for rank in group.status()["ranks"]] == pids


def test_insufficient_gpu_memory_for_the_weights_is_reported_with_the_numbers(full):
    with RankGroup("cuda:0") as group, Hog(1):
        pids = [rank["pid"] for rank in group.status()["ranks"]]
        with pytest.raises(JobError, match=r"needs .* GiB is available \(other processes hold \d\d"):
            group.decode(random_latent(1, 32, 1, 4, 4), full)
        assert [rank["pid"] for rank in group.status()["ranks"]] == pids
