"""Streamed blocks on a GPU. The weights are random, with blocks of the real size, but fewer of them."""

import gc

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.denoise_memory import TIMESTEP, TaskSteps, random_transformer
from distributed import JobError, RankGroup
from distributed.denoise.denoiser import Denoiser
from distributed.denoise.job import DenoiseRequest
from distributed.denoise.layout import Architecture
from distributed.denoise.loading import streamed_bytes
from distributed.denoise.module import fast_module
from distributed.denoise.placement import Placement
from tests.ranks.test_memory_gpu import Hog
from tests.unit.denoise_models import make_inputs

pytestmark = pytest.mark.gpu

LAYERS, TEXT = 10, 100
SHORT, LONG = (9, 30, 53), (31, 30, 53)
"""Latents of 480x848 with 33 and 121 frames."""
GPU = torch.device("cuda:0")


@pytest.fixture(scope="module")
def transformer():
    return random_transformer(Architecture(layers=LAYERS), GPU, torch.bfloat16)


def loaded(transformer, size: tuple[int, int, int], placement: Placement | None) -> tuple[TaskSteps, int]:
    """Return steps with this placement of the weights, and the bytes that they may use."""
    gc.collect()
    torch.cuda.empty_cache()
    steps = TaskSteps(transformer, size, TEXT, None, GPU, torch.bfloat16)
    steps.task._open(steps.fields)
    sizes = steps.task._sizes(DenoiseRequest.from_json(steps.fields["request"]))
    memory = sizes.needed(placement or sizes.fastest)
    steps.fields["request"]["memory"] = memory
    steps.load()
    assert steps.task.placement == (placement or sizes.fastest)
    return steps, memory


@pytest.fixture(scope="module")
def whole(transformer):
    """The result with all weights on the device."""
    steps, _ = loaded(transformer, SHORT, None)
    return steps.step()


@pytest.mark.parametrize("resident", [LAYERS, LAYERS - 3, LAYERS // 2, 0])
def test_a_limit_holds_and_the_bits_are_those_of_resident_weights(resident, transformer, whole):
    before = torch.cuda.memory_allocated()
    steps, memory = loaded(transformer, SHORT, Placement(False, resident, LAYERS))
    assert torch.cuda.memory_allocated() - before == pytest.approx(steps.task.held, rel=0.02)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        assert torch.equal(steps.step(), whole)
        assert torch.cuda.max_memory_allocated() - before <= memory
    steps.back()
    assert torch.equal(steps.step(), whole)


def test_copies_run_while_the_device_computes(transformer):
    steps, _ = loaded(transformer, LONG, Placement(False, 0, LAYERS))
    steps.step()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        steps.step()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    spans = [(event.time_range.start, event.time_range.end, "HtoD" in event.name) for event in events]
    kernels = [span[:2] for span, event in zip(spans, events, strict=True) if not event.name.startswith("Mem")]
    copies = [(start, end) for start, end, is_copy in spans if is_copy]
    total = sum(end - start for start, end in copies)
    overlapped = sum(max(0, min(end, until) - max(start, since)) for start, end in copies for since, until in kernels)
    assert total > 0 and overlapped > total / 2


def test_a_pipelines_transformer_streams_from_host_memory_with_the_bits_of_resident_weights():
    """As with offload "group" in ComfyUI's process."""
    with GPU:
        model = HunyuanVideo15Transformer3DModel(**Architecture(layers=LAYERS).config)
    model.to(torch.bfloat16).eval().requires_grad_(False)
    inputs = {name: part.to(GPU) for name, part in make_inputs(model, SHORT).items()}
    expected = fast_module(model)(**inputs).sample
    model.to("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()

    def cancel(done: int, _: int) -> None:
        if done == LAYERS // 2:
            raise InterruptedError

    shell = fast_module(model, cancel, GPU)
    assert torch.cuda.memory_allocated() - before == pytest.approx(streamed_bytes(model), rel=0.02)
    with pytest.raises(InterruptedError):
        shell(**inputs)
    shell = fast_module(model, stream_to=GPU)
    for _ in range(3):
        assert torch.equal(shell(**inputs).sample, expected)
    assert expected.isfinite().all() and model.device.type == "cpu"
    del shell
    gc.collect()
    assert torch.cuda.memory_allocated() == pytest.approx(before, abs=2**20)


def test_ranks_adapt_to_the_gpu_memory_that_another_process_leaves(transformer):
    architecture = transformer.checkpoint.architecture
    latents = torch.randn(1, architecture.in_channels, *SHORT)
    conditions = [{"encoder_hidden_states": torch.randn(1, TEXT, architecture.text_width)}]
    with RankGroup("cuda:0") as group:
        denoiser = Denoiser(transformer.checkpoint, group.run)
        expected = denoiser(latents, TIMESTEP, conditions)
        pids = [rank["pid"] for rank in group.status()["ranks"]]
        for gib in (2.5, 2):  # all blocks would take 3
            group.release()
            with Hog(gib):
                assert torch.equal(denoiser(latents, TIMESTEP, conditions), expected)
        group.release()
        with Hog(1), pytest.raises(JobError, match=r"needs .* GiB is available \(other processes hold \d\d"):
            denoiser(latents, TIMESTEP, conditions)
        assert torch.equal(denoiser(latents, TIMESTEP, conditions), expected)
        assert [rank["pid"] for rank in group.status()["ranks"]] == pids
