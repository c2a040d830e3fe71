"""How the engine ends a decode that does not come to its end, on the CPU."""

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


class Impatient:
    """A watch that has the decode end after so many questions whether it shall."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def progress(self, done: int, total: int) -> None: ...

    def cancelled(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module")
def engine():
    return Engine(decoder_tensors(TINY, CPU), CPU, torch.float32)


def scarce(engine: Engine) -> DecodeRequest:
    """A job with so little memory that it is done in blocks."""
    _, least = choose_plan(engine.weights, SHAPE[3:], SHAPE[3:], SHAPE[2], False, free=1)
    return DecodeRequest(SHAPE, memory=least)


@pytest.mark.parametrize("questions", [9, 10_000])
def test_copies_of_borders_in_flight_are_waited_for_however_the_decode_ends(engine, monkeypatch, questions):
    closed = []
    monkeypatch.setattr(block_borders.BlockBorders, "close", lambda self: closed.append(self))
    job = scarce(engine)
    frames = torch.full(job.frames_shape, float("nan"))
    if questions < 100:
        with pytest.raises(Cancelled):
            engine.decode(job, random_latent(*SHAPE), frames, Impatient(questions))
    else:
        engine.decode(job, random_latent(*SHAPE), frames, Impatient(questions))
        assert frames.isfinite().all()
    assert len(closed) == 1


def test_what_a_decode_held_when_memory_ran_out_is_free_for_the_next_try(engine, monkeypatch):
    held = []

    def lack(self, x):
        held.append(weakref.ref(x.x))
        raise torch.OutOfMemoryError("there is no more")
        yield

    def free(self) -> int:
        if held:
            held.append(held[0]() is None)
        return 2**40

    monkeypatch.setattr(decoder.Tail, "_pixels", lack)
    monkeypatch.setattr(Engine, "_free", free)
    request = DecodeRequest(SHAPE)
    with pytest.raises(OutOfMemory):
        engine.decode(request, random_latent(*SHAPE), torch.empty(request.frames_shape), Impatient(10_000))
    assert held[1] is True


def test_tiles_are_not_cut_into_blocks_and_what_waits_for_blending_is_counted(engine, monkeypatch):
    planned, reserved = [], []
    choose = engine_module.choose_plan

    def chosen(*args, **options):
        planned.append(choose(*args, **options))
        return planned[-1]

    monkeypatch.setattr(engine_module, "choose_plan", chosen)
    monkeypatch.setattr(Engine, "_reserve", lambda self, needed: reserved.append(needed))
    job = DecodeRequest(SHAPE, "tiled", tile_size=320, overlap=64, memory=2**40)
    engine.decode(job, random_latent(*SHAPE), torch.empty(job.frames_shape), Impatient(10_000))
    _, least = choose(engine.weights, (20, 20), (20, 20), SHAPE[2], False, 1, allow_blocks=False)
    with pytest.raises(OutOfMemory):
        engine.decode(replace(job, memory=least), random_latent(*SHAPE), torch.empty(job.frames_shape), Impatient(9))
    (plan, needed), (nothing, _) = planned
    tiles = 17 * (20 * 20 + 20 * 6 + 4 * 20 + 4 * 6) * 256 * 3 * 4
    assert plan.blocks == (1, 1) and nothing is None and reserved == [needed + tiles]
