"""The element-wise work between convolutions, each piece one pass over memory.

Frames lie channels-last, [frames, height, width, channels]. Each function here has a plain-torch form, which is its
definition, and where Triton and a CUDA device are at hand a kernel in `triton_kernels` that computes the same in
one pass. Arithmetic is float32 whatever the dtype of the tensors, rounded once when it is stored.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def _triton():
    """The Triton kernels, or None where there is no Triton (Windows, CPU-only machines, Ascend)."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton_kernels

    return triton_kernels


def _kernels(x: Tensor):
    return _triton() if x.is_cuda else None


@torch.inference_mode()
def warm_up(latent_channels: int, widths: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
    """Have compiled what a decoder of these widths, deepest level first, will call.

    Each form of a kernel is compiled when it is first called: 24 s in all on an H100's host, 1 s where Triton finds
    them on disk (2026-11-23). This takes a few kilobytes of the device.
    """
    if device.type != "cuda" or _triton() is None:
        return

    def frames(channels: int, n: int = 1, border: int = 0) -> Tensor:
        return torch.zeros(n, 1 + border, 1 + border, channels, device=device, dtype=dtype)

    def vector(channels: int) -> Tensor:
        return torch.ones(channels, device=device)

    fill_window(frames(latent_channels), frames(latent_channels, border=2))
    for width in dict.fromkeys(widths):
        x, window, one = frames(width), frames(width, border=2), vector(width)
        for form in ({}, {"gamma": one}, {"bias": one, "gamma": one}, {"bias": one, "add": x.clone()}):
            fill_window(x, window, **form)
        fill_window(x, window, bias=one, add=x.clone(), gamma=one)
    for level, (width, following) in enumerate(pairwise(widths)):
        factor = 8 if level < 2 else 4
        for first in (True, False):
            packed = frames(factor * following, 2)
            upsample(packed, vector(factor * following), frames(width, 2), temporal=factor == 8, first=first)
    sum_taps(frames(96, border=2), vector(3))


def fill_window(
    x: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    gamma: Tensor | None = None,
) -> None:
    """Write what a convolution reads: the value, perhaps normalised and activated, with a border of one.

    value = x + add + bias (what is given of them); where `add` is given, x becomes the value, in place. With
    `gamma`, what is written is silu(rms_norm(value) * gamma), the norm over channels only; else the value itself.

    x, add: [n, H, W, C]; bias, gamma: [C], float32; out: [n, H + 2, W + 2, C], whose border repeats the nearest
    pixel.
    """
    kernels = _kernels(x)
    if kernels:
        return kernels.fill_window(x, out, bias, add, gamma)
    value = x.float()
    if add is not None:
        value = value + add
    if bias is not None:
        value = value + bias
    if add is not None:
        x.copy_(value)
    if gamma is not None:
        value = F.silu(F.normalize(value, dim=-1) * (gamma.numel() ** 0.5 * gamma))
    out[:, 1:-1, 1:-1] = value
    repeat_border(out)


def repeat_border(window: Tensor) -> None:
    """Fill the border of one, in place, with the nearest pixel inside it. window: [n, H + 2, W + 2, C]."""
    window[:, 0] = window[:, 1]
    window[:, -1] = window[:, -2]
    window[:, :, 0] = window[:, :, 1]
    window[:, :, -1] = window[:, :, -2]


def upsample(packed: Tensor, bias: Tensor, x: Tensor, *, temporal: bool, first: bool) -> Tensor:
    """Unpack channels into space and time and add the shortcut (diffusers' HunyuanVideo15Upsample).

    packed: [n, H, W, factor * C], the convolution's output without its bias; bias: [factor * C] float32;
    x: [n, H, W, Cin], the convolution's input, repeated to be the shortcut. factor is 8 with `temporal`, else 4.
    Returns [frames, 2H, 2W, C]. With `first` and `temporal` the first frame is the video's first, which becomes one
    frame and not two.
    """
    kernels = _kernels(packed)
    if kernels:
        return kernels.upsample(packed, bias, x, temporal, first)
    rate = 2 if temporal else 1
    channels = packed.shape[-1] // (4 * rate)
    value = packed.float() + bias
    repeats = packed.shape[-1] // x.shape[-1]
    shortcut = x.float()
    if not (temporal and first):
        return (_unpack(value, rate) + _unpack(shortcut.repeat_interleave(repeats, -1), rate)).to(x.dtype)
    one = _unpack(value[:1], 1)[..., :channels]
    one = one + _unpack(shortcut[:1], 1).repeat_interleave(repeats // 2, -1)
    rest = _unpack(value[1:], 2) + _unpack(shortcut[1:].repeat_interleave(repeats, -1), 2)
    return torch.cat([one, rest]).to(x.dtype)


def _unpack(packed: Tensor, rate: int) -> Tensor:
    """[n, H, W, rate * 2 * 2 * C] -> [rate * n, 2H, 2W, C]."""
    n, height, width, total = packed.shape
    channels = total // (rate * 4)
    packed = packed.view(n, height, width, rate, 2, 2, channels).permute(0, 3, 1, 4, 2, 5, 6)
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
