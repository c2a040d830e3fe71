"""The element-wise operations between convolutions. Each function is one pass over memory.

Frames are channels-last, [frames, height, width, channels]. The plain PyTorch form of each function is its reference.
On devices with fused kernels a Triton kernel in `triton_kernels` computes the same in one pass. Arithmetic is float32
for every dtype, and results are rounded once, when they are stored.
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
    """Return the Triton kernels, or None if Triton is not installed (Windows, CPU-only machines, Ascend)."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton_kernels

    return triton_kernels


@cache
def are_fused(device: torch.device) -> bool:
    """Return whether this device uses the Triton kernels."""
    return Device(device).has_fused_kernels and _triton() is not None


def _kernels(x: Tensor):
    """Return the Triton kernels, or None if the plain forms are used for x, [..., H, W, C]."""
    within_a_frame = 2**31  # kernels use 32-bit offsets within a frame
    return _triton() if are_fused(x.device) and x.stride(-4) < within_a_frame else None


STRIP = 16 * 2**20
"""Bytes of float32 values that a plain form processes at a time. Its working memory is a few times this size for
operands of any size. It is also faster than processing everything at once (on 2 cores 1.5 times in float32, 2.3 to 3.1
times in bfloat16, 2026-11-25; 8 MiB is as fast, 1 and 64 MiB are slower)."""


def _strips(shape: Sequence[int]) -> Iterator[slice]:
    """Return the slices of rows that divide [n, H, W, C] into strips."""
    n, height, width, channels = shape
    rows = max(1, STRIP // (4 * n * width * channels))
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def _rows_of(frames: Tensor | None, products: Products | None, rows: slice) -> tuple[Tensor | None, Products | None]:
    """Return these rows of frames and products, [n, H, W, C]."""
    if products is not None:
        first = products.first_frame
        transformed = tuple(tensor[:, rows] for tensor in products.transformed)
        products = Products(transformed, None if first is None else first[:, rows])
    return None if frames is None else frames[:, rows], products


def value_of(x: Tensor | None, products: Products | None, bias: Tensor | None) -> Tensor:
    """Return the sum of those of x, products and bias that are not None: [n, H, W, C], float32, in new memory."""
    value = x.to(torch.float32, copy=True) if products is None else sum_products(products)
    if products is not None and x is not None:
        value += x
    return value if bias is None else value.add_(bias)


def activate_(value: Tensor, gamma: Tensor | None) -> Tensor:
    """Compute silu(rms_norm(value) * gamma) in place, with the norm over channels. No effect if `gamma` is None."""
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
    """Write the input of a convolution: frames, activated if `gamma` is given, transformed for Winograd's algorithm.

    x, products: n frames [n, H, W, C]. The value is the sum of x, products and bias. If x and products are both given,
    the value is also stored in x. past: [2, H, W, C], the two activated frames before these, in its dtype; it is
    overwritten with the last two of these. first_chunk: the video begins with these frames, and copies of its first
    frame take the place of `past`. bias, gamma: [C], float32. out: [m + 2, groups, H', W', C]. corner: row and column
    of `out` at which the frames begin. The pixels around them, usually a border of one, repeat the nearest pixel. n is
    a multiple of m, or one more in the first chunk: then the video's first frame is written without a transform to
    out[0, 0], and out[1:, 0] is not written.
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
    """Write the input of the last layer: x + products + bias, activated, [n, H, W, C], without a transform.

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
    """Return the view of `window`, [..., H', W', C], to which frames [n, H, W, C] are written."""
    (top, left), (height, width) = corner, frames.shape[1:3]
    return window[..., top : top + height, left : left + width, :]


def _repeat_border(window: Tensor, corner: tuple[int, int], frames: Tensor) -> None:
    """Fill the pixels around the frames in `window`, in place, with the nearest pixel of the frames."""
    (top, left), (bottom, right) = corner, (corner[i] + frames.shape[1 + i] for i in (0, 1))
    window[..., :top, :, :] = window[..., top : top + 1, :, :]
    window[..., bottom:, :, :] = window[..., bottom - 1 : bottom, :, :]
    window[..., :left, :] = window[..., left : left + 1, :]
    window[..., right:, :] = window[..., right - 1 : right, :]


def upsample(
    packed: Products, bias: Tensor, x: Tensor, out: Tensor, corner: tuple[int, int], *, temporal: bool, first: bool
) -> None:
    """Unpack channels into space and time and add the shortcut (diffusers' HunyuanVideo15Upsample).

    packed: [n, H, W, factor * C], the convolution's products, where factor is 8 with `temporal` and 4 without.
    bias: [factor * C], float32. x: [n, H, W, Cin], the convolution's input, whose channels are repeated to form the
    shortcut. out: [frames, H', W', C], the region of [frames, 2H, 2W, C] whose first row and column are `corner`. With
    `first` and `temporal` the first frame is the video's first, which becomes one frame instead of two.
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
    """Unpack [n, H, W, rate * 2 * 2 * C] to [rate * n, 2H, 2W, C]."""
    n, height, width, total = packed.shape
    channels = total // (rate * 4)
    packed = packed.reshape(n, height, width, rate, 2, 2, channels).permute(0, 3, 1, 4, 2, 5, 6)
    return packed.reshape(n * rate, 2 * height, 2 * width, channels)


def taps(window: Tensor, weight: Tensor) -> Tensor:
    """Apply each tap of the last convolution at each position: [n, H + 2, W + 2, C] to [n, H + 2, W + 2, rows].

    weight: [rows, C] with rows >= 27 taps x 3 colours. A convolution to 3 channels would leave matrix units idle; a
    matrix product with 81 does not. `sum_taps` sums the taps.
    """
    return F.linear(window, weight)


def sum_taps(partial: Tensor, bias: Tensor) -> Tensor:
    """Sum the output of `taps` over height and width, but not over time.

    partial: [n, H + 2, W + 2, >= 81], channels ordered (time, height, width, colour). bias: [3], float32.
    Returns float32 [n, 3, H, W, 3]; dimension 1 is the tap in time. The sum of the three taps of a frame is its pixels,
    scaled from the decoder's range -1..1 to 0..1, with the bias.
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
