"""A GPU that other processes fill. Full-size random weights, so that there is something to fit."""

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
    """Another process, which leaves so many GiB of the card free while the context lasts."""

    def __init__(self, gib: float) -> None:
        self.gib = gib

    def __enter__(self) -> None:
        command = [sys.executable, "-c", HOG, str(self.gib)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "full\n"

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def test_a_card_that_another_process_fills_is_shared_as_far_as_it_goes(full):
    latent = random_latent(1, 32, 5, 30, 53)
    with RankGroup("cuda:0") as group:
        expected = group.decode(latent, full).clone()

        def check(frames: torch.Tensor) -> None:
            """To rounding: other steps, or another algorithm that cuDNN takes for want of workspace and keeps to."""
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


def test_memory_that_goes_while_the_weights_are_loaded_is_told_with_the_numbers(full):
    with RankGroup("cuda:0") as group, Hog(1):
        pids = [rank["pid"] for rank in group.status()["ranks"]]
        with pytest.raises(JobError, match=r"needs .* GiB is available \(other processes hold \d\d"):
            group.decode(random_latent(1, 32, 1, 4, 4), full)
        assert [rank["pid"] for rank in group.status()["ranks"]] == pids
