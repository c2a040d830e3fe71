"""The warm-up compiles exactly the kernels that a decode calls. Calls are recorded on the CPU."""

import pytest
import torch

from benchmarks.random_weights import TINY, decoder_tensors, random_latent
from distributed.ops import kernels
from distributed.vae.hunyuanvideo15 import warm_up
from distributed.vae.hunyuanvideo15.decoder import Tail, Trunk, split
from distributed.vae.hunyuanvideo15.layout import Architecture
from distributed.vae.hunyuanvideo15.weights import Weights
from distributed.vae.interface import Steps
from distributed.vae.regions import whole

CPU = torch.device("cpu")


class Recorder:
    """A fake of the Triton kernels that records the specialisation of each call and computes the plain form."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forms: set[tuple] = set()
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(kernels, "_kernels", lambda x: self)

    def plain(self, call, *arguments, **options):
        with self.monkeypatch.context() as patch:
            patch.setattr(kernels, "_kernels", lambda x: None)
            return call(*arguments, **options)

    def fill(self, x, products, past, out, corner, first_chunk, bias, gamma):
        given = tuple(each is not None for each in (x, products, past, bias, gamma))
        m = len(products.transformed if past is None else out) - 2
        self.forms.add(("fill", out.shape[-1], m, out.dtype, *given))
        if past is None:
            return self.plain(kernels.fill_window, x, products, out, corner, bias=bias, gamma=gamma)
        options = {"first_chunk": first_chunk, "bias": bias, "gamma": gamma}
        return self.plain(kernels.fill_groups, x, products, past, out, corner, **options)

    def upsample(self, packed, bias, x, out, corner, temporal, first):
        m = len(packed.transformed) - 2
        self.forms.add(("upsample", out.shape[-1], x.shape[-1], m, x.dtype, temporal, temporal and first))
        return self.plain(kernels.upsample, packed, bias, x, out, corner, temporal=temporal, first=first)

    def sum_taps(self, partial, bias):
        self.forms.add(("sum_taps", partial.shape[-1], partial.dtype))
        return self.plain(kernels.sum_taps, partial, bias)


@torch.inference_mode()
def forms_of_a_decode(recorder: Recorder, weights: Weights, time: int) -> set[tuple]:
    latent, steps = random_latent(time, 2, 3, 32).to(weights.dtype), Steps(2, 4)
    trunk, tail = Trunk(weights, 2, 3, time), Tail(weights, whole(2, 3, weights.convs), steps)
    recorder.forms = set()
    assert sum(map(len, tail.run(trunk.run(split(latent, steps.trunk))))) == 4 * time - 3
    return recorder.forms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_warm_up_compiles_exactly_the_kernels_of_a_decode(monkeypatch, dtype):
    weights, recorder = Weights(decoder_tensors(TINY, CPU), CPU, dtype), Recorder(monkeypatch)
    called = forms_of_a_decode(recorder, weights, 1) | forms_of_a_decode(recorder, weights, 6)
    recorder.forms = set()
    warm_up.call_every_form(Architecture(TINY), CPU, dtype)
    assert len(called) >= 20
    assert called == recorder.forms


def test_the_warm_up_does_nothing_without_fused_kernels(monkeypatch):
    recorder = Recorder(monkeypatch)
    warm_up.warm_up(Architecture(TINY), CPU, torch.float32)
    assert not recorder.forms
