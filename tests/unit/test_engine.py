"""How the engine ends a decode: completion, cancel and out of memory, on the CPU."""

import weakref
from dataclasses import replace

import pytest
import torch

from benchmarks.random_weights import TINY, decoder_tensors, random_latent
from distributed.errors import Cancelled, OutOfMemory
from distributed.vae import block_borders
from distributed.vae import engine as engine_module
from distributed.vae.engine import Engine
from distributed.vae.hunyuanvideo15 import decoder
from distributed.vae.job import DecodeRequest
from distributed.vae.plan import choose_plan

CPU = torch.device("cpu")
SHAPE = (1, 32, 5, 20, 22)


class CancelAfter:
    """A watch that reports a cancel after `checks` checks."""

    def __init__(self, checks: int) -> None:
        self.remaining = checks

    def progress(self, done: int, total: int) -> None: ...

    def cancelled(self) -> bool:
        self.remaining -= 1
        return self.remaining < 0


@pytest.fixture(scope="module")
def engine():
    return Engine(decoder_tensors(TINY, CPU), CPU, torch.float32)


def limited(engine: Engine) -> DecodeRequest:
    """Return a request with so little memory that it is decoded in blocks."""
    _, smallest = choose_plan(engine.weights, SHAPE[3:], SHAPE[3:], SHAPE[2], False, free=1)
    return DecodeRequest(SHAPE, memory=smallest)


@pytest.mark.parametrize("checks", [9, 10_000])
def test_border_copies_are_waited_for_after_a_decode_and_after_a_cancel(engine, monkeypatch, checks):
    closed = []
    monkeypatch.setattr(block_borders.BlockBorders, "close", lambda self: closed.append(self))
    request = limited(engine)
    frames = torch.full(request.frames_shape, float("nan"))
    if checks < 100:
        with pytest.raises(Cancelled):
            engine.decode(request, random_latent(*SHAPE), frames, CancelAfter(checks))
    else:
        engine.decode(request, random_latent(*SHAPE), frames, CancelAfter(checks))
        assert frames.isfinite().all()
    assert len(closed) == 1


def test_tensors_of_a_decode_that_ran_out_of_memory_are_freed_before_a_retry(engine, monkeypatch):
    held = []

    def run_out(self, x):
        held.append(weakref.ref(x.x))
        raise torch.OutOfMemoryError("out of memory")
        yield

    def free(self) -> int:
        if held:
            held.append(held[0]() is None)
        return 2**40

    monkeypatch.setattr(decoder.Tail, "_pixels", run_out)
    monkeypatch.setattr(Engine, "_free", free)
    request = DecodeRequest(SHAPE)
    with pytest.raises(OutOfMemory):
        engine.decode(request, random_latent(*SHAPE), torch.empty(request.frames_shape), CancelAfter(10_000))
    assert held[1] is True


def test_tiles_have_no_blocks_and_decoded_tiles_are_counted_in_the_plan(engine, monkeypatch):
    planned, reserved = [], []
    choose = engine_module.choose_plan

    def chosen(*args, **options):
        planned.append(choose(*args, **options))
        return planned[-1]

    monkeypatch.setattr(engine_module, "choose_plan", chosen)
    monkeypatch.setattr(Engine, "_reserve", lambda self, needed: reserved.append(needed))
    job = DecodeRequest(SHAPE, "tiled", tile_size=320, overlap=64, memory=2**40)
    engine.decode(job, random_latent(*SHAPE), torch.empty(job.frames_shape), CancelAfter(10_000))
    _, smallest = choose(engine.weights, (20, 20), (20, 20), SHAPE[2], False, 1, allow_blocks=False)
    with pytest.raises(OutOfMemory):
        engine.decode(
            replace(job, memory=smallest), random_latent(*SHAPE), torch.empty(job.frames_shape), CancelAfter(9)
        )
    (plan, needed), (nothing, _) = planned
    tiles = 17 * (20 * 20 + 20 * 6 + 4 * 20 + 4 * 6) * 256 * 3 * 4
    assert plan.blocks == (1, 1) and nothing is None and reserved == [needed + tiles]
