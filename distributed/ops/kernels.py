"""The element-wise work between convolutions, each piece one pass over memory.

Frames lie channels-last, [frames, height, width, channels]. Each function here has a plain-torch form, which is its
definition, and where Triton and a CUDA device are at hand a kernel in `triton_kernels` that computes the same in
one pass. Arithmetic is float32 whatever the dtype of the tensors, rounded once when it is stored.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .winograd import Products, sum_products, transform_frames


@cache
def _triton():
    """The Triton kernels, or None where there is no Triton (Windows, CPU-only machines, Ascend)."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton_kernels

    return triton_kernels


def _kernels(x: Tensor):
    """x: [..., H, W, C]. Kernels count within a frame with 32 bits."""
    return _triton() if x.is_cuda and x.stride(-4) < 2**31 else None


CORNER = 1, 1
"""Where frames begin in a window with a border of one."""


@torch.inference_mode()
def warm_up(latent_channels: int, widths: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
    """Have compiled what a decoder of these widths, deepest level first, will call.

    Each form of a kernel is compiled when it is first called: 20 s in all on an H100's host, 2 s where Triton finds
    them on disk (2026-11-24). This takes a few kilobytes of the device.
    """
    if device.type != "cuda" or _triton() is None:
        return

    def frames(channels: int, n: int = 1, border: int = 0) -> Tensor:
        return torch.zeros(n, 1 + border, 1 + border, channels, device=device, dtype=dtype)

    def vector(channels: int) -> Tensor:
        return torch.ones(channels, device=device)

    def products(channels: int, m: int, alone: bool) -> Products:
        return Products(tuple(frames(channels) for _ in range(m + 2)), frames(channels) if alone else None)

    def fill(channels: int, m: int, *, stream: bool = True, convolved: bool = True, norm: bool = True) -> None:
        one = vector(channels)
        x, given = frames(channels, m) if stream else None, products(channels, m, False) if convolved else None
        past, out = frames(channels, 2), frames(channels, m + 2, border=2)[:, None]
        bias, gamma = one if convolved else None, one if norm else None
        fill_groups(x, given, past, out, CORNER, fresh=True, bias=bias, gamma=gamma)

    groups = [2 if level < 2 else 4 for level in range(len(widths))]  # time is doubled by the first two upsamplers
    fill(latent_channels, 2, convolved=False, norm=False)
    for level, (width, m) in enumerate(zip(widths, groups, strict=True)):
        fill(width, m)
        fill(width, m, convolved=False)
        fill(width, m, stream=False)
        if level < len(widths) - 1:
            fill(width, m, convolved=level > 0, norm=False)
    one, m = vector(widths[-1]), groups[-1]
    x, given, out = frames(widths[-1], m), products(widths[-1], m, False), frames(widths[-1], m, border=2)
    fill_window(x, given, out, CORNER, bias=one, gamma=one)
    for level, (width, following) in enumerate(pairwise(widths)):
        factor = 8 if level < 2 else 4
        for first in (True, False):
            bias = vector(factor * following)
            packed = products(len(bias), groups[level], first)
            x, temporal = frames(width, packed.shape[0]), factor == 8
            out = frames(following, len(x) * (1 + temporal) - (temporal and first), border=1)
            upsample(packed, bias, x, out, (0, 0), temporal=temporal, first=first)
    sum_taps(frames(96, border=2), vector(3))


STRIP = 16 * 2**20
"""Bytes of float32 values that a plain form takes at a time. What it needs beside its operands is a few times that,
however large they are; and it is faster than all at once (on 2 cores 1.5 times in float32, 2.3 to 3.1 in bfloat16,
2026-11-25; 8 MiB are as fast, 1 and 64 MiB slower)."""


def _strips(shape: Sequence[int]) -> Iterator[slice]:
    """Rows of [n, H, W, C] that make up a strip."""
    n, height, width, channels = shape
    rows = max(1, STRIP // (4 * n * width * channels))
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def _rows_of(frames: Tensor | None, products: Products | None, rows: slice) -> tuple[Tensor | None, Products | None]:
    """These rows of [n, H, W, C]."""
    if products is not None:
        alone = products.alone
        products = Products(tuple(part[:, rows] for part in products.parts), None if alone is None else alone[:, rows])
    return None if frames is None else frames[:, rows], products


def value_of(x: Tensor | None, products: Products | None, bias: Tensor | None) -> Tensor:
    """x + products + bias, of what is given of them: [n, H, W, C], float32, in memory of its own."""
    value = x.to(torch.float32, copy=True) if products is None else sum_products(products)
    if products is not None and x is not None:
        value += x
    return value if bias is None else value.add_(bias)


def activate_(value: Tensor, gamma: Tensor | None) -> Tensor:
    """silu(rms_norm(value) * gamma), in place, the norm over channels only; without `gamma` the value itself."""
    if gamma is None:
        return value
    norm = torch.linalg.vector_norm(value, dim=-1, keepdim=True).clamp_min_(1e-12)
    return F.silu(value.div_(norm).mul_(gamma.numel() ** 0.5 * gamma), inplace=True)


def fill_groups(
    x: Tensor | None,
    products: Products | None,
    past: Tensor,
    out: Tensor,
    corner: tuple[int, int],
    *,
    fresh: bool,
    bias: Tensor | None,
    gamma: Tensor | None,
) -> None:
    """Write what a convolution reads: frames, activated where `gamma` is given, transformed for Winograd's algorithm.

    x, products: n frames [n, H, W, C], whose sum with the bias is the value; where both are given, x becomes it, in
    place. past: [2, H, W, C], the two activated frames before these, rounded to its dtype; becomes the last two of
    these. fresh: the video begins, and what was before is its first frame. bias, gamma: [C], float32.
    out: [m + 2, groups, H', W', C]. corner: the row and the column of it where the frames begin; what is around them,
    usually a border of one, repeats the nearest pixel. n is a multiple of m, or one more where the video begins: then
    its first frame stands alone, as it is, in out[0, 0], and the rest of the first group is not written.
    """
    kernels = _kernels(out)
    if kernels:
        return kernels.fill(x, products, past, out, corner, fresh, bias, gamma)
    m, inner = len(out) - 2, _inner(out, corner, past)
    for rows in _strips((products if x is None else x).shape):
        strip, sums = _rows_of(x, products, rows)
        value = value_of(strip, sums, bias)
        if strip is not None and sums is not None:
            strip.copy_(value)
        frames, before, into = activate_(value, gamma).to(out.dtype), past[:, rows], inner[..., rows, :, :]
        if fresh:
            before[:] = frames[0]
        alone = len(frames) % m
        into[0, :alone] = frames[:alone]
        transform_frames(before, frames[alone:], into[:, alone:])
        before.copy_(torch.cat([before, frames[-2:]])[-2:])
    _repeat_border(out, corner, past)


def fill_window(
    x: Tensor, products: Products, out: Tensor, corner: tuple[int, int], *, bias: Tensor, gamma: Tensor
) -> None:
    """Write what the last layer reads: x + products + bias, activated, [n, H, W, C], as it is.

    out: [n, H', W', C], `corner` and what is around the frames as in `fill_groups`.
    """
    kernels = _kernels(out)
    if kernels:
        return kernels.fill(x, products, None, out, corner, False, bias, gamma)
    inner = _inner(out, corner, x)
    for rows in _strips(x.shape):
        inner[:, rows] = activate_(value_of(*_rows_of(x, products, rows), bias), gamma)
    _repeat_border(out, corner, x)


def _inner(window: Tensor, corner: tuple[int, int], frames: Tensor) -> Tensor:
    """Where in `window`, [..., H', W', C], frames [n, H, W, C] are."""
    (top, left), (height, width) = corner, frames.shape[1:3]
    return window[..., top : top + height, left : left + width, :]


def _repeat_border(window: Tensor, corner: tuple[int, int], frames: Tensor) -> None:
    """Fill what is around the frames in `window`, in place, with the nearest of their pixels."""
    (top, left), (bottom, right) = corner, (corner[i] + frames.shape[1 + i] for i in (0, 1))
    window[..., :top, :, :] = window[..., top : top + 1, :, :]
    window[..., bottom:, :, :] = window[..., bottom - 1 : bottom, :, :]
    window[..., :left, :] = window[..., left : left + 1, :]
    window[..., right:, :] = window[..., right - 1 : right, :]


def upsample(
    packed: Products, bias: Tensor, x: Tensor, out: Tensor, corner: tuple[int, int], *, temporal: bool, first: bool
) -> None:
    """Unpack channels into space and time and add the shortcut (diffusers' HunyuanVideo15Upsample).

    packed: [n, H, W, factor * C], the convolution's products; bias: [factor * C] float32;
    x: [n, H, W, Cin], the convolution's input, repeated to be the shortcut. factor is 8 with `temporal`, else 4.
    out: [frames, H', W', C], that part of [frames, 2H, 2W, C] whose first row and column are `corner`. With `first` and
    `temporal` the first frame is the video's first, which becomes one frame and not two.
    """
    kernels = _kernels(x)
    if kernels:
        return kernels.upsample(packed, bias, x, out, corner, temporal, first)
    top, left = corner
    for rows in _strips(packed.shape):
        begin, end = max(top, 2 * rows.start), min(top + out.shape[1], 2 * rows.stop)
        if begin < end:
            strip, sums = _rows_of(x, packed, rows)
            frames = _upsampled(sums, bias, strip, temporal, first)[:, :, left : left + out.shape[2]]
            out[:, begin - top : end - top] = frames[:, begin - 2 * rows.start : end - 2 * rows.start]


def _upsampled(packed: Products, bias: Tensor, x: Tensor, temporal: bool, first: bool) -> Tensor:
    rate = 2 if temporal else 1
    channels = packed.shape[-1] // (4 * rate)
    value = sum_products(packed) + bias
    repeats = packed.shape[-1] // x.shape[-1]
    shortcut = x.float()
    if not (temporal and first):
        return _unpack(value, rate) + _unpack(shortcut.repeat_interleave(repeats, -1), rate)
    one = _unpack(value[:1], 1)[..., :channels]
    one = one + _unpack(shortcut[:1], 1).repeat_interleave(repeats // 2, -1)
    rest = _unpack(value[1:], 2) + _unpack(shortcut[1:].repeat_interleave(repeats, -1), 2)
    return torch.cat([one, rest])


def _unpack(packed: Tensor, rate: int) -> Tensor:
    """[n, H, W, rate * 2 * 2 * C] -> [rate * n, 2H, 2W, C]."""
    n, height, width, total = packed.shape
    channels = total // (rate * 4)
    packed = packed.reshape(n, height, width, rate, 2, 2, channels).permute(0, 3, 1, 4, 2, 5, 6)
    return packed.reshape(n * rate, 2 * height, 2 * width, channels)


def taps(window: Tensor, weight: Tensor) -> Tensor:
    """Every tap of the last convolution at every position: [n, H + 2, W + 2, C] x [C, 27 * 3] -> [n, H + 2, W + 2, 81].

    A convolution to 3 channels leaves matrix units idle; one to 81, with the sum of taps left to `sum_taps`, does not.
    """
    return F.linear(window, weight)


def sum_taps(partial: Tensor, bias: Tensor) -> Tensor:
    """Add up the taps of `taps` in space, and leave those in time apart.

    partial: [n, H + 2, W + 2, >= 81], channels ordered (time, height, width, colour); bias: [3] float32.
    Returns float32 [n, 3, H, W, 3], the second dimension time. The three, each for its frame, add up to pixels that
    are 0 for the decoder's -1 and 1 for its 1: scale and bias are in.
    """
    kernels = _kernels(partial)
    if kernels:
        return kernels.sum_taps(partial, bias)
    n, height, width = partial.shape[0], partial.shape[1] - 2, partial.shape[2] - 2
    total = partial.new_zeros(n, 3, height, width, 3, dtype=torch.float32)
    for t in range(3):
        for tap in range(9):
            y, x = divmod(tap, 3)
            channel = (9 * t + tap) * 3
            total[:, t] += partial[:, y : y + height, x : x + width, channel : channel + 3].float()
    total[:, 2] += bias + 1
    return total.mul_(0.5)
