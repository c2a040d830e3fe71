"""Denoising steps on real ranks with a memory limit that makes them stream blocks from host memory."""

import pytest
import torch

from distributed import Cancelled, JobError, RankGroup
from distributed.denoise.job import DenoiseJob
from distributed.denoise.placement import Placement
from distributed.denoise.task import DenoiseTask
from tests.ranks.moments import kill_within_a_job, pids
from tests.ranks.test_denoise_task import LONG, SMALL, step
from tests.unit.denoise_models import make_model

LAYERS = 8
HALF = Placement(False, LAYERS // 2, LAYERS)
NONE = Placement(False, 0, LAYERS)


@pytest.fixture(scope="module")
def model():
    return make_model(num_layers=LAYERS)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model in bfloat16, so that weights on the device are copies, aligned as those that are streamed."""
    path = tmp_path_factory.mktemp("pipeline")
    model.to(torch.bfloat16).save_pretrained(path / "transformer", max_shard_size="1MB")
    model.float()
    return path


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def group(request):
    with RankGroup(["cpu"] * request.param) as group:
        yield group


def limit(group, denoiser, latents, time, conditions, placement: Placement) -> int:
    """Return the bytes that a step with this placement uses on each rank of the group."""
    prepared = [denoiser.conditions(**side) for side in conditions]
    job = DenoiseJob.make(denoiser.checkpoint, latents, time, prepared)
    task = DenoiseTask(torch.device("cpu"))
    task.world_size = len(group.status()["ranks"])
    task._open(job.fields | {"dtype": "float32"})
    return task._sizes(job.request).needed(placement)


def test_ranks_that_stream_blocks_give_the_bits_of_those_that_do_not(model, folder, group):
    denoiser = group.denoiser(folder)
    for branches in (1, 2):
        arguments = step(model, branches=branches, **SMALL)[:3]
        whole = denoiser(*arguments)
        for placement in (HALF, NONE):
            memory = limit(group, denoiser, *arguments, placement)
            for _ in range(2):
                assert torch.equal(denoiser(*arguments, memory=memory), whole)
        with pytest.raises(JobError, match=r"the denoising step needs 0\.1\d GiB, 0\.1\d GiB is available"):
            denoiser(*arguments, memory=memory - 1)
        group.release()
        assert torch.equal(denoiser(*arguments, memory=memory), whole)
        assert torch.equal(denoiser(*arguments), whole)


def test_ranks_that_stream_hear_a_cancel_and_share_the_device_with_a_decode(model, folder, group, vae):
    denoiser = group.denoiser(folder)
    arguments, before = step(model, **LONG)[:3], pids(group)
    memory = limit(group, denoiser, *arguments, NONE)
    whole = denoiser(*arguments, memory=memory)

    def cancel(done: int, total: int) -> None:
        if 0 < done < total:
            group.cancel()

    condition = {name: part for name, part in arguments[2][0].items() if name != "latents"}
    huge = torch.randn(1, 9, 8, 40, 40)  # a step that would take ten seconds or more
    with pytest.raises(Cancelled):
        limited = limit(group, denoiser, huge, arguments[1], [condition], NONE)
        denoiser(huge, arguments[1], [condition], memory=limited, progress=cancel)
    assert torch.equal(denoiser(*arguments, memory=memory), whole)
    assert group.decode(torch.randn(1, 32, 2, 3, 4), vae).isfinite().all()
    assert torch.equal(denoiser(*arguments, memory=memory), whole)
    assert pids(group) == before


def test_a_killed_rank_costs_a_streamed_step_and_no_more(model, folder, group):
    denoiser, notices = group.denoiser(folder), []
    arguments = step(model, **LONG)[:3]
    memory = limit(group, denoiser, *arguments, HALF)
    whole, before = denoiser(*arguments, memory=memory), pids(group)
    killer = kill_within_a_job(group, 0)
    while killer.is_alive():
        assert torch.equal(denoiser(*arguments, memory=memory, notice=notices.append), whole)
    assert pids(group) != before and len(notices) == 1
