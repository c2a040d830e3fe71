"""Decodes on two GPUs of one host, connected by NCCL."""

import os
import signal
import time

import psutil
import pytest
import torch

from benchmarks.random_weights import random_latent
from distributed import Cancelled, RankGroup
from tests.ranks.moments import during

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
LONG = (1, 32, 31, 30, 53)


@pytest.fixture(scope="module")
def two():
    with RankGroup("cuda:0,cuda:1") as group:
        yield group


@pytest.fixture(scope="module")
def expected(full):
    with RankGroup("cuda:0") as group:
        return group.decode(random_latent(*LONG), full).clone()


def test_two_gpus_give_the_same_frames_as_one(vae):
    with RankGroup("cuda:0", dtype="float32") as one, RankGroup("cuda:0,cuda:1", dtype="float32") as two:
        for shape in [(1, 32, 5, 5, 7), (2, 32, 2, 1, 3), (1, 32, 1, 1, 1), (1, 32, 9, 2, 3)]:
            z = random_latent(*shape)
            torch.testing.assert_close(two.decode(z, vae), one.decode(z, vae), atol=1e-5, rtol=0)
        for shape, tile_size, overlap in [((1, 32, 3, 9, 6), 64, 16), ((2, 32, 2, 5, 5), 32, 0)]:
            z, options = random_latent(*shape), {"mode": "tiled", "tile_size": tile_size, "overlap": overlap}
            assert torch.equal(two.decode(z, vae, **options), one.decode(z, vae, **options))


def test_frames_of_two_gpus_at_full_size_differ_only_by_rounding(two, full, expected):
    frames = two.decode(random_latent(*LONG), full)
    assert (frames - expected).norm() / expected.norm() < 0.01
    error = (frames - expected).abs().amax(dim=(0, 1, 2, 4))
    assert error[416:432].max() <= 2 * torch.cat([error[:416], error[432:]]).max()


def test_a_killed_rank_is_replaced_and_the_frames_are_the_same(two, full):
    frames = two.decode(random_latent(*LONG), full).clone()
    killer = during(two, lambda: os.kill(two.status()["ranks"][1]["pid"], signal.SIGKILL))
    again = two.decode(random_latent(*LONG), full)
    killer.join()
    assert torch.equal(again, frames)


def test_a_cancel_ends_the_decode_soon_and_keeps_the_ranks(two, full):
    frames = two.decode(random_latent(*LONG), full).clone()
    pids = [rank["pid"] for rank in two.status()["ranks"]]
    canceller = during(two, two.cancel)
    with pytest.raises(Cancelled):
        two.decode(random_latent(1, 32, 121, 30, 53), full)
    canceller.join()
    assert torch.equal(two.decode(random_latent(*LONG), full), frames)
    assert [rank["pid"] for rank in two.status()["ranks"]] == pids


def test_no_rank_on_a_gpu_listens_beyond_loopback(two, full):
    two.decode(random_latent(1, 32, 1, 4, 4), full)
    for rank in two.status()["ranks"]:
        listening = [c.laddr.ip for c in psutil.Process(rank["pid"]).net_connections("inet") if c.status == "LISTEN"]
        assert listening and set(listening) <= {"127.0.0.1"}


def test_idle_ranks_use_no_gpu_time(two, full):
    def busiest(seconds: float) -> int:
        """Return the highest utilization, in percent, that the driver reports for the two GPUs."""
        end, highest = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            highest = max(highest, *(torch.cuda.utilization(device) for device in range(2)))
            time.sleep(0.05)
        return highest

    seen = []
    watcher = during(two, lambda: seen.append(busiest(0.5)))
    two.decode(random_latent(1, 32, 121, 30, 53), full)
    watcher.join()
    assert seen[0] > 50  # the driver reports utilization
    time.sleep(2)
    assert busiest(5) == 0
