"""Convolution over time by Winograd's algorithm, against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distributed.winograd import convolve, sum_products, transform_frames, transform_taps


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transformed(past: Tensor, frames: Tensor) -> Tensor:
    window = frames.new_empty(4, -(-len(frames) // 2), *frames.shape[1:])
    transform_frames(past, frames, window)
    return window


def both(n: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same frames, [n, H, W, out], by this module and by a three-dimensional convolution."""
    past, frames = draw(2, 6, 7, weight.shape[1], seed=1), draw(n, 6, 7, weight.shape[1], seed=2)
    taps = transform_taps(weight, torch.float64)
    ours = sum_products(convolve(transformed(past, frames), n % 2, taps))
    plain = F.conv3d(torch.cat([past, frames]).permute(3, 0, 1, 2)[None], weight)[0].permute(1, 2, 3, 0)
    return ours.double(), plain


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_it_is_the_convolution(n):
    ours, plain = both(n, draw(5, 8, 3, 3, 3))
    assert ours.shape == plain.shape == (n, 4, 5, 5)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)  # sums are formed in float32


def test_a_wide_convolution_is_cut_into_pieces(monkeypatch):
    monkeypatch.setattr("distributed.winograd.WIDE", 4)
    monkeypatch.setattr("distributed.winograd.PIECE", 2)
    ours, plain = both(3, draw(5, 8, 3, 3, 3))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "share"), [(8, 2 / 3), (1, 1), (3, 7 / 9)])
def test_frames_in_pairs_take_two_thirds_of_the_multiplications(n, share):
    weight, frames = draw(5, 8, 3, 3, 3), draw(n + 2, 6, 7, 8)
    window, taps = transformed(frames[:2], frames[2:]), transform_taps(weight, torch.float64)
    with FlopCounterMode(display=False) as ours:
        convolve(window, n % 2, taps)
    with FlopCounterMode(display=False) as plain:
        F.conv3d(frames.permute(3, 0, 1, 2)[None], weight)
    assert ours.get_total_flops() == pytest.approx(share * plain.get_total_flops())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_taps_are_rounded_once(dtype):
    weight = draw(3, 4, 3, 3, 3).float()
    g0, g1, g2 = weight.unbind(2)
    taps = transform_taps(weight, dtype)
    for tap, exact in zip(taps, (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2), strict=True):
        assert tap.is_contiguous(memory_format=torch.channels_last)
        assert (tap - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
