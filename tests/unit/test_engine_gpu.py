"""The engine on a GPU: results, block borders in host memory, the warm-up, and peak memory."""

import pytest
import torch

from benchmarks.random_weights import FULL, TINY, decoder_tensors
from distributed.ops import kernels
from distributed.ranks.task import JobWatch
from distributed.vae.engine import Engine
from distributed.vae.hunyuanvideo15.layout import Architecture
from distributed.vae.hunyuanvideo15.warm_up import warm_up
from distributed.vae.job import DecodeRequest
from distributed.vae.plan import choose_plan


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["seamless", "tiled"])
def test_frames_of_a_gpu_equal_those_of_the_cpu(mode, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tensors = decoder_tensors(TINY, torch.device("cpu"))
    job = DecodeRequest((2, 32, 5, 6, 7), mode, tile_size=64, overlap=16)
    latent = torch.randn(job.latent_shape)
    results = []
    for device in ("cpu", "cuda"):
        frames = torch.full(job.frames_shape, float("nan"))
        engine = Engine(tensors, torch.device(device), torch.float32)
        engine.decode(job, latent, frames, JobWatch())
        engine.release()
        results.append(frames)
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=0)


@pytest.mark.gpu
def test_block_borders_survive_the_copy_to_host_memory(monkeypatch):
    """Compare a decode in blocks on the GPU, whose borders are copied to the host and back, with the CPU's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tensors = decoder_tensors(TINY, torch.device("cpu"))
    latent = torch.randn(1, 32, 9, 20, 22)
    engine = Engine(tensors, torch.device("cuda"), torch.float32)
    _, smallest = choose_plan(engine.weights, (20, 22), (20, 22), 9, False, free=1)
    plan, _ = choose_plan(engine.weights, (20, 22), (20, 22), 9, False, smallest)
    assert plan.blocks == (2, 2)
    whole, divided = (DecodeRequest(tuple(latent.shape), memory=memory) for memory in (None, smallest))
    frames = [torch.full(job.frames_shape, float("nan")) for job in (whole, divided, divided)]
    Engine(tensors, torch.device("cpu"), torch.float32).decode(whole, latent, frames[0], JobWatch())
    for place in frames[1:]:  # the second decode reuses the pinned memory
        engine.decode(divided, latent, place, JobWatch())
        torch.testing.assert_close(place, frames[0], atol=1e-4, rtol=0)
    engine.release()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_decode_after_the_warm_up_compiles_no_kernel(dtype):
    from triton import knobs

    from distributed.ops import triton_kernels

    for kernel in (getattr(triton_kernels, f"_{name}") for name in ("fill", "repeat_border", "upsample", "sum_taps")):
        kernel.device_caches.clear()
    compiled = []
    device = torch.device("cuda")
    tensors = decoder_tensors(TINY, torch.device("cpu"))
    knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name)
    try:
        warm_up(Architecture(TINY), device, dtype)
        warmed = len(compiled)
        for shape in ((1, 32, 5, 6, 7), (1, 32, 1, 16, 32)):
            job = DecodeRequest(shape)
            Engine(tensors, device, dtype).decode(job, torch.randn(shape), torch.empty(job.frames_shape), JobWatch())
    finally:
        knobs.runtime.jit_post_compile_hook = None
    assert warmed > 10 and not compiled[warmed:]


@pytest.mark.gpu
@pytest.mark.parametrize("triton", [True, False], ids=["with Triton", "without Triton"])
@pytest.mark.parametrize(
    ("shape", "gib"), [((1, 32, 9, 30, 53), None), ((1, 32, 5, 30, 53), 4.5), ((1, 32, 5, 30, 53), 3)]
)
def test_peak_memory_does_not_exceed_the_plan(shape, gib, triton, monkeypatch):
    if not triton:
        monkeypatch.setattr(kernels, "_kernels", lambda x: None)
    device = torch.device("cuda")
    tensors = {key: value.bfloat16().cpu() for key, value in decoder_tensors(FULL, device).items()}
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    reserve = Engine._reserve

    def reserve_and_reset(engine, needed):
        reserve(engine, needed)
        torch.cuda.reset_peak_memory_stats()

    monkeypatch.setattr(Engine, "_reserve", reserve_and_reset)
    engine = Engine(tensors, device, torch.bfloat16)
    job = DecodeRequest(shape, memory=gib and int(gib * 2**30))
    engine.decode(job, torch.randn(shape), torch.empty(job.frames_shape), JobWatch())
    assert torch.cuda.max_memory_allocated() - before <= engine.needed
    engine.release()
