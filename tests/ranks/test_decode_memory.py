"""Decodes that run out of memory on real ranks."""

import pytest
import torch

from benchmarks.random_weights import random_latent
from distributed import JobError, RankGroup
from tests.ranks.conftest import ECHO
from tests.ranks.moments import pids

SHAPE = (1, 32, 4, 2, 4)


@pytest.fixture(scope="module")
def fault(tmp_path_factory):
    """The file that tells ranks which fault to cause."""
    path = tmp_path_factory.mktemp("fault") / "fault"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HV15_TEST_FAULT", str(path))
        yield path


@pytest.fixture(scope="module")
def faulty(fault):
    """Two ranks that run out of memory if `fault` says so."""
    with RankGroup(["cpu", "cpu"], worker=ECHO) as group:
        yield group


def test_a_decode_that_runs_out_of_memory_is_retried_with_a_smaller_limit(faulty, fault, vae):
    expected = faulty.decode(random_latent(*SHAPE), vae)
    fault.write_text("memory 1 once")
    notices = []
    frames = faulty.decode(random_latent(*SHAPE), vae, notice=notices.append)
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)  # smaller steps change the rounding
    assert len(notices) == 1
    assert notices[0].startswith("Not enough memory on cpu: the decode needs ")
    assert "Retrying with a limit of " in notices[0]


def test_a_decode_on_a_grid_of_ranks_is_retried_if_one_rank_runs_out_of_memory(fault, vae):
    """The neighbours of this rank wait for its borders when it fails, so their exchanges must be reset."""
    notices = []
    with RankGroup(["cpu"] * 4, worker=ECHO, stall_timeout=20) as group:
        expected = group.decode(random_latent(1, 32, 24, 4, 4), vae)
        fault.write_text("memory 1 once")
        frames = group.decode(random_latent(1, 32, 24, 4, 4), vae, notice=notices.append)
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)
    assert len(notices) == 1 and "Retrying with a limit of " in notices[0]


def test_running_out_of_memory_while_loading_weights_is_reported_with_the_numbers(faulty, fault, vae):
    faulty.release()
    before = pids(faulty)
    fault.write_text("load 1 once")
    with pytest.raises(JobError, match=r"Not enough memory on cpu: the decode needs \d.* GiB, \d.* GiB is available"):
        faulty.decode(random_latent(*SHAPE), vae)
    assert faulty.decode(random_latent(*SHAPE), vae).isfinite().all()
    assert pids(faulty) == before


def test_a_single_rank_that_runs_out_of_memory_keeps_running(fault, vae):
    with RankGroup(["cpu"], worker=ECHO) as group:
        before = pids(group)
        fault.write_text("memory 0 once")
        assert group.decode(random_latent(*SHAPE), vae).isfinite().all()
        fault.write_text("memory 0")
        with pytest.raises(JobError, match="GiB is available"):
            group.decode(random_latent(*SHAPE), vae)
        fault.unlink()
        assert pids(group) == before


def test_insufficient_memory_for_a_decode_is_reported_with_the_numbers(pair, vae):
    before = pids(pair)
    with pytest.raises(JobError, match=r"needs .* GiB, 0\.00 GiB is available"):
        pair.decode(random_latent(1, 32, 4, 4, 4), vae, memory=2**20)
    assert pids(pair) == before
