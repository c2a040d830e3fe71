"""Forwards whose blocks are streamed, on the CPU: the same code as on a GPU, with copies that end at once."""

import threading

import pytest
import torch
from safetensors.torch import save_file

from distributed.denoise.job import DenoiseJob
from distributed.denoise.layout import Architecture
from distributed.denoise.placement import SLOTS, Placement
from distributed.denoise.task import DenoiseTask
from distributed.denoise.weights import open_transformer
from distributed.errors import Cancelled, OutOfMemory
from distributed.ranks.task import JobWatch
from tests.unit.core_inputs import core_inputs, job_of, random_weights
from tests.unit.denoise_models import make_model, run
from tests.unit.test_denoise_task import make_job

LAYERS = 6
PLACEMENTS = [Placement(False, resident, LAYERS) for resident in range(LAYERS - SLOTS)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A transformer in bfloat16. The tests compute in float32, so resident weights are as aligned as those in slots."""
    path = tmp_path_factory.mktemp("transformer")
    model = make_model(use_meanflow=True, num_layers=LAYERS)
    model.to(torch.bfloat16).save_pretrained(path)
    return open_transformer(path)


@pytest.fixture(scope="module")
def job(checkpoint):
    return make_job(make_model(use_meanflow=True, num_layers=LAYERS), checkpoint)[0]


@pytest.fixture(scope="module")
def expected(job):
    """The result with all weights on the device."""
    return run(DenoiseTask(torch.device("cpu")), job)


@pytest.fixture
def task():
    return DenoiseTask(torch.device("cpu"))


def within(task: DenoiseTask, job: DenoiseJob, placement: Placement) -> DenoiseJob:
    """Return the job with the smallest limit for which a task that has seen the checkpoint chooses the placement."""
    task._open(job.fields | {"dtype": "float32"})
    return job.limited(task._sizes(job.request).needed(placement))


def streamed_names(task: DenoiseTask) -> set[int]:
    blocks = task.transformer.model.transformer_blocks
    return {i for i, block in enumerate(blocks) if block.attn.to_q.weight.is_meta}


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: f"{placement.resident} resident")
def test_a_streamed_forward_has_the_bits_of_a_resident_one(job, expected, task, placement):
    limited = within(task, job, placement)
    for _ in range(3):
        assert torch.equal(run(task, limited), expected)
    assert task.placement == placement and streamed_names(task) == set(placement.streamed)
    assert len(task.transformer.blocks.slots) == SLOTS


def test_the_weights_that_are_on_the_device_are_those_that_were_counted(job, task):
    for placement in [Placement(True, LAYERS, LAYERS), Placement(False, LAYERS, LAYERS), *PLACEMENTS]:
        run(task, within(task, job, placement))
        modules = [task.transformer.model, *task.transformer.blocks.slots]
        found = [part for module in modules for part in module.parameters() if not part.is_meta]
        assert task.placement == placement
        assert sum(part.nbytes for part in found) == task._sizes().weights(placement) == task.held
        task.release()
    assert task.held == 0


def test_too_small_a_limit_is_refused_with_the_numbers_of_the_smallest_placement(job, expected, task):
    least = within(task, job, Placement(False, 0, LAYERS))
    with pytest.raises(OutOfMemory) as shortage:
        run(task, job.limited(least.memory - 1))
    error = shortage.value
    assert (error.needed, error.free) == (least.memory, least.memory - 1)
    assert error.smallest_plan and error.on_all_ranks
    assert torch.equal(run(task, least), expected)


def test_a_step_that_runs_out_of_memory_can_be_retried_with_less(job, expected, task, monkeypatch):
    run(task, within(task, job, PLACEMENTS[2]))
    with monkeypatch.context() as context, pytest.raises(OutOfMemory) as shortage:
        context.setattr(task.transformer.blocks.uploads, "copy", _raise(torch.OutOfMemoryError("no room")))
        run(task, within(task, job, PLACEMENTS[2]))
    error = shortage.value
    assert error.needed == within(task, job, PLACEMENTS[2]).memory
    assert not error.smallest_plan and not error.on_all_ranks
    assert torch.equal(run(task, within(task, job, PLACEMENTS[1])), expected) and task.placement == PLACEMENTS[1]


def _raise(error: Exception):
    def call(*args, **kwargs):
        raise error

    return call


def test_weights_return_to_the_device_when_the_limit_rises_unless_memory_ran_out(job, expected, task):
    small, large = (within(task, job, placement) for placement in PLACEMENTS[:2])
    for limited, placement in ((small, PLACEMENTS[0]), (large, PLACEMENTS[1]), (small, PLACEMENTS[0])):
        assert torch.equal(run(task, limited), expected) and task.placement == placement
    task.short = True
    assert torch.equal(run(task, large), expected) and task.placement == PLACEMENTS[0]
    task.release()
    run(task, large)
    assert task.placement == PLACEMENTS[1]


def test_steps_of_one_sampling_do_not_load_again_when_free_memory_rises(job, task, monkeypatch):
    """A changed `UNLIMITED` stands for an accelerator's free memory, because a step on the CPU has no such limit."""
    free = within(task, job, PLACEMENTS[1]).memory
    monkeypatch.setattr("distributed.denoise.task.UNLIMITED", free)
    run(task, job)
    assert task.placement == PLACEMENTS[1]
    transformer = task.transformer
    monkeypatch.setattr("distributed.denoise.task.UNLIMITED", 2 * free)
    run(task, job)
    assert task.transformer is transformer
    monkeypatch.setattr("distributed.denoise.task.UNLIMITED", within(task, job, PLACEMENTS[0]).memory)
    run(task, job)
    assert task.placement == PLACEMENTS[0]


@pytest.mark.parametrize("blocks", range(1, LAYERS))
def test_a_cancel_after_any_block_leaves_a_stream_that_the_next_step_can_use(job, expected, task, blocks):
    class Late(JobWatch):
        """Cancels after some blocks."""

        def cancelled(self) -> bool:
            return self.state[1] == blocks

    limited = within(task, job, PLACEMENTS[1])
    run(task, limited)
    for _ in range(2):
        with pytest.raises(Cancelled):
            run(task, limited, Late())
        assert torch.equal(run(task, limited), expected)


def test_an_exception_in_a_block_leaves_a_stream_that_the_next_step_can_use(job, expected, task, monkeypatch):
    limited = within(task, job, PLACEMENTS[0])
    run(task, limited)
    calls, original = [], torch.nn.functional.gelu
    with monkeypatch.context() as context, pytest.raises(ZeroDivisionError):

        def fail(*args, **kwargs):
            calls.append(1)
            return original(*args, **kwargs) if len(calls) < 5 else 1 / 0

        context.setattr("torch.nn.functional.gelu", fail)
        run(task, limited)
    assert torch.equal(run(task, limited), expected)


def test_a_failed_copy_ends_the_forward_and_not_the_stream(job, expected, task, monkeypatch):
    limited = within(task, job, PLACEMENTS[0])
    run(task, limited)
    blocks, copies = task.transformer.blocks, []

    def fail(weights, after, copy=blocks.uploads.copy):
        copies.append(threading.current_thread().name)
        if len(copies) == 3:
            raise OSError("the file is gone")
        return copy(weights, after)

    with monkeypatch.context() as context, pytest.raises(OSError, match="the file is gone"):
        context.setattr(blocks.uploads, "copy", fail)
        run(task, limited)
    assert len(copies) in (3, 4) and threading.current_thread().name not in copies
    assert torch.equal(run(task, limited), expected)


def test_scaled_8_bit_weights_of_streamed_blocks_have_the_values_of_resident_ones(task, tmp_path):
    weights = random_weights(Architecture(heads=2, layers=4))
    for key in [key for key in weights if key.startswith("double_blocks.") and key.endswith("weight")]:
        if weights[key].ndim == 2:
            scale = weights[key].abs().max() / 448
            weights |= {key: (weights[key] / scale).to(torch.float8_e4m3fn), f"{key}_scale": scale}
    save_file(weights, tmp_path / "model.safetensors")
    job = job_of(open_transformer(tmp_path / "model.safetensors"), core_inputs())
    resident = run(DenoiseTask(torch.device("cpu")), job)
    placement = Placement(False, 1, 4)
    assert torch.equal(run(task, within(task, job, placement)), resident)
    assert task.placement == placement and resident.isfinite().all()


def test_a_stream_that_is_dropped_ends_its_thread(job, task):
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("weights")]

    before = set(threads())
    run(task, within(task, job, PLACEMENTS[0]))
    (own,) = set(threads()) - before
    task.release()
    own.join(60)
    assert not own.is_alive()
