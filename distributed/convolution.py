"""A convolution of pictures in the pieces in which the device is fastest.

cuDNN chooses its algorithm by the shape, and here and there misses: 1024 -> 1024 channels take, for 14 frames of 32 x
90 pixels, three times as long as for 14 of 90 x 32 or for 16 of 32 x 90. So does one in thirteen of 650 shapes with
1024 channels out or more, and none with fewer (cuDNN 9.19 on an H100, 2026-11-24). Its own search among algorithms does
not find the fast one. Half of the frames, or a part of the channels, is another shape, and mostly a good one.
"""

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

MANY = 1024
"""Channels out from which on pieces are tried."""

TOO_MANY = 4096
"""More channels are not tried at once: 1024 -> 8192 was up to six times too slow."""

GAIN = 0.8
"""What pieces must at least take less than one: they are copied together, and timing is not exact."""

FAIR = 0.6
"""The share of the best rate yet at which nothing else is tried; a miss is at 0.3 to 0.45 of it."""

_fastest: dict[tuple, tuple[int, int]] = {}
"""For each shape that this process has met, frames and channels of a piece."""

_rates: dict[tuple, float] = {}
"""The best rate yet, for each type of number and device: multiplications in some unit."""


def conv2d(frames: Tensor, taps: Tensor) -> Tensor:
    """frames [n, C, H + 2, W + 2], taps [out, C, 3, 3] -> [n, out, H, W]. A new shape is timed, once in a process."""
    if not frames.is_cuda or len(taps) < MANY:
        return F.conv2d(frames, taps)
    shape = frames.shape, taps.shape, frames.dtype, frames.device
    if shape not in _fastest:
        _fastest[shape] = _choose(frames, taps)
    return in_pieces(frames, taps, *_fastest[shape])


def in_pieces(frames: Tensor, taps: Tensor, some_frames: int, some_channels: int) -> Tensor:
    """The same of so many frames and channels out at a time."""
    given = [_joined([F.conv2d(x, w) for w in taps.split(some_channels)], 1) for x in frames.split(some_frames)]
    return _joined(given, 0)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _choose(frames: Tensor, taps: Tensor) -> tuple[int, int]:
    n, channels = len(frames), min(len(taps), TOO_MANY)
    whole, *others = dict.fromkeys(product((n, -(-n // 2)), (channels, MANY)))
    times = {whole: _milliseconds(frames, taps, whole)}
    work, kind = frames.numel() * len(taps), (frames.dtype, frames.device)
    if work / times[whole] < FAIR * _rates.get(kind, math.inf):
        times.update((pieces, _milliseconds(frames, taps, pieces)) for pieces in others)
    best = min(times, key=times.get)
    _rates[kind] = max(work / times[best], _rates.get(kind, 0))
    return best if times[best] < GAIN * times[whole] else whole


def _milliseconds(frames: Tensor, taps: Tensor, pieces: tuple[int, int]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    in_pieces(frames, taps, *pieces)  # the first call takes longer
    begin.record()
    in_pieces(frames, taps, *pieces)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
