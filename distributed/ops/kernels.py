"""The element-wise work between convolutions, each piece one pass over memory.

Frames are stored channels-last, [frames, height, width, channels]. The plain-torch form of each function is its
definition. On devices with fused kernels a Triton kernel in `triton_kernels` computes the same in one pass. Arithmetic
is float32 whatever the dtype of the tensors, and rounded once when it is stored.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ranks.devices import Device
from .winograd import Products, sum_products, transform_frames


@cache
def _triton():
    """The Triton kernels, or None where there is no Triton (Windows, CPU-only machines, Ascend)."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton_kernels

    return triton_kernels


@cache
def are_fused(device: torch.device) -> bool:
    """Whether there are Triton kernels for this device."""
    return Device(device).has_fused_kernels and _triton() is not None


def _kernels(x: Tensor):
    """The Triton kernels, or None if the plain forms are to be used. x: [..., H, W, C]."""
    within_a_frame = 2**31  # kernels count pixels and channels within a frame with 32 bits
    return _triton() if are_fused(x.device) and x.stride(-4) < within_a_frame else None


STRIP = 16 * 2**20
"""Bytes of float32 values that a plain form takes at a time. Beside its operands it needs a few times that, however
large they are. It is also faster than all at once (on 2 cores 1.5 times in float32, 2.3 to 3.1 times in bfloat16,
2026-11-25; 8 MiB is as fast, 1 and 64 MiB are slower)."""


def _strips(shape: Sequence[int]) -> Iterator[slice]:
    """Rows of [n, H, W, C] that make up a strip."""
    n, height, width, channels = shape
    rows = max(1, STRIP // (4 * n * width * channels))
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def _rows_of(frames: Tensor | None, products: Products | None, rows: slice) -> tuple[Tensor | None, Products | None]:
    """These rows of [n, H, W, C]."""
    if products is not None:
        first = products.first_frame
        transformed = tuple(tensor[:, rows] for tensor in products.transformed)
        products = Products(transformed, None if first is None else first[:, rows])
    return None if frames is None else frames[:, rows], products


def value_of(x: Tensor | None, products: Products | None, bias: Tensor | None) -> Tensor:
    """x + products + bias, of those that are given: [n, H, W, C], float32, in new memory."""
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
    first_chunk: bool,
    bias: Tensor | None,
    gamma: Tensor | None,
) -> None:
    """Write what a convolution reads: frames, activated where `gamma` is given, transformed for Winograd's algorithm.

    x, products: n frames [n, H, W, C]. The value is their sum with the bias. If both are given, x becomes the value, in
    place. past: [2, H, W, C], the two activated frames before these, rounded to its dtype; becomes the last two of
    these. first_chunk: the video begins with these frames, and the frames before are copies of its first. bias, gamma:
    [C], float32. out: [m + 2, groups, H', W', C]. corner: the row and the column of `out` at which the frames begin.
    The pixels around them, usually a border of one, repeat the nearest pixel. n is a multiple of m, or one more in the
    first chunk: then the video's first frame is written as it is to out[0, 0], and the rest of that group is not
    written.
    """
    kernels = _kernels(out)
    if kernels:
        return kernels.fill(x, products, past, out, corner, first_chunk, bias, gamma)
    m, inner = len(out) - 2, _inner(out, corner, past)
    for rows in _strips((products if x is None else x).shape):
        strip, sums = _rows_of(x, products, rows)
        value = value_of(strip, sums, bias)
        if strip is not None and sums is not None:
            strip.copy_(value)
        frames, before, into = activate_(value, gamma).to(out.dtype), past[:, rows], inner[..., rows, :, :]
        if first_chunk:
            before[:] = frames[0]
        first_frame = len(frames) % m
        into[0, :first_frame] = frames[:first_frame]
        transform_frames(before, frames[first_frame:], into[:, first_frame:])
        before.copy_(torch.cat([before, frames[-2:]])[-2:])
    _repeat_border(out, corner, past)


def fill_window(
    x: Tensor, products: Products, out: Tensor, corner: tuple[int, int], *, bias: Tensor, gamma: Tensor
) -> None:
    """Write what the last layer reads: x + products + bias, activated, [n, H, W, C], without a transform.

    out: [n, H', W', C]. `corner` and the pixels around the frames are as in `fill_groups`.
    """
    kernels = _kernels(out)
    if kernels:
        return kernels.fill(x, products, None, out, corner, False, bias, gamma)
    inner = _inner(out, corner, x)
    for rows in _strips(x.shape):
        inner[:, rows] = activate_(value_of(*_rows_of(x, products, rows), bias), gamma)
    _repeat_border(out, corner, x)


def _inner(window: Tensor, corner: tuple[int, int], frames: Tensor) -> Tensor:
    """The view of `window`, [..., H', W', C], that frames [n, H, W, C] are written to."""
    (top, left), (height, width) = corner, frames.shape[1:3]
    return window[..., top : top + height, left : left + width, :]


def _repeat_border(window: Tensor, corner: tuple[int, int], frames: Tensor) -> None:
    """Fill the pixels around the frames in `window`, in place, with the nearest of the frames' pixels."""
    (top, left), (bottom, right) = corner, (corner[i] + frames.shape[1 + i] for i in (0, 1))
    window[..., :top, :, :] = window[..., top : top + 1, :, :]
    window[..., bottom:, :, :] = window[..., bottom - 1 : bottom, :, :]
    window[..., :left, :] = window[..., left : left + 1, :]
    window[..., right:, :] = window[..., right - 1 : right, :]


def upsample(
    packed: Products, bias: Tensor, x: Tensor, out: Tensor, corner: tuple[int, int], *, temporal: bool, first: bool
) -> None:
    """Unpack channels into space and time and add the shortcut (diffusers' HunyuanVideo15Upsample).

    packed: [n, H, W, factor * C], the convolution's products; bias: [factor * C] float32; x: [n, H, W, Cin], the
    convolution's input, repeated to be the shortcut. factor is 8 with `temporal`, else 4. out: [frames, H', W', C], the
    region of [frames, 2H, 2W, C] whose first row and column are `corner`. With `first` and `temporal` the first frame
    is the video's first, which becomes one frame and not two.
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

    A convolution to 3 channels leaves matrix units idle. A product with 81 channels does not; `sum_taps` adds the taps.
    """
    return F.linear(window, weight)


def sum_taps(partial: Tensor, bias: Tensor) -> Tensor:
    """Add up the taps of `taps` in space, and keep those in time separate.

    partial: [n, H + 2, W + 2, >= 81], channels ordered (time, height, width, colour); bias: [3] float32.
    Returns float32 [n, 3, H, W, 3]; the second dimension is the tap in time. The three, each for its frame, add up to
    pixels that are 0 for the decoder's -1 and 1 for its 1. Scale and bias are included.
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
