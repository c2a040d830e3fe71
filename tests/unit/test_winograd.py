"""Convolution over time by Winograd's algorithm, compared with a 3D convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distributed.ops.winograd import TOTAL, convolve, matrices, sum_products, transform_frames, transform_taps


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group(past: Tensor, frames: Tensor, m: int) -> tuple[Tensor, int]:
    """Return the window of a convolution, and 1 if its first frame is in no group, otherwise 0."""
    groups, first_frame = divmod(len(frames), m)
    window = frames.new_zeros(m + 2, groups + first_frame, *frames.shape[1:])
    window[0, :first_frame] = frames[:first_frame]
    transform_frames(past, frames[first_frame:], window[:, first_frame:])
    return window, first_frame


def both(m: int, n: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same frames, [n, H, W, out], computed by this module and by a 3D convolution."""
    past, frames = draw(2, 6, 7, weight.shape[1], seed=1), draw(n, 6, 7, weight.shape[1], seed=2)
    if n % m:  # the video begins with these frames
        past[:] = frames[0]
    ours = sum_products(convolve(*group(past, frames, m), transform_taps(weight, torch.float64, m)))
    plain = F.conv3d(torch.cat([past, frames]).permute(3, 0, 1, 2)[None], weight)[0].permute(1, 2, 3, 0)
    return ours.double(), plain


LENGTHS = [(2, 1), (2, 2), (2, 3), (2, 6), (4, 1), (4, 4), (4, 5), (4, 8)]


@pytest.mark.parametrize(("m", "n"), LENGTHS)
def test_the_result_equals_a_3d_convolution(m, n):
    ours, plain = both(m, n, draw(5, 8, 3, 3, 3))
    assert ours.shape == plain.shape == (n, 4, 5, 5)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)  # products are summed in float32


@pytest.mark.parametrize(("m", "n", "share"), [(2, 8, 2 / 3), (4, 8, 1 / 2), (4, 1, 1 / 3), (4, 5, 7 / 15)])
def test_groups_of_frames_need_fewer_multiplications(m, n, share):
    weight, frames = draw(5, 8, 3, 3, 3), draw(n + 2, 6, 7, 8)
    arguments = *group(frames[:2], frames[2:], m), transform_taps(weight, torch.float64, m)
    with FlopCounterMode(display=False) as ours:
        convolve(*arguments)
    with FlopCounterMode(display=False) as plain:
        F.conv3d(frames.permute(3, 0, 1, 2)[None], weight)
    assert ours.get_total_flops() == pytest.approx(share * plain.get_total_flops())


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_taps_are_rounded_once(dtype, m):
    weight = draw(3, 4, 3, 3, 3).float()
    taps = transform_taps(weight, dtype, m)
    rows = [*matrices(m)[2], (1, 1, 1)]
    for tap, row in zip([*taps[: m + 2], taps[TOTAL[m]]], rows, strict=True):
        exact = torch.einsum("t,oityx->oiyx", torch.tensor(row, dtype=torch.float32), weight)
        assert tap.is_contiguous(memory_format=torch.channels_last)
        assert (tap - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
