"""A convolution of pictures in pieces that are not of a shape for which the device chooses badly.

cuDNN chooses its algorithm by the shape and misses for some: there it takes two to six times as long as for shapes
nearby (cuDNN 9.19 on an H100, 668 shapes, 2026-11-24). No shape of fewer than 1024 channels out was among them, and all
that were lie in the ranges below, by what comes out: frames times height times width. Its own search does not find the
fast algorithm, and measuring here would have processes choose differently, and so differ in the last bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MANY = 1024
"""Channels out. More of them miss in `FEW`, and more than 4096 beyond; 1024 do not."""

FEW = range(5_700, 8_200)
"""Positions at which 2048 and 4096 channels out take twice as long."""

MIDDLE, LOW = range(31_000, 53_000), 43
"""Positions at which low pictures, of up to so many rows, take three times as long, with 1024 channels out or more."""


def conv2d(frames: Tensor, taps: Tensor) -> Tensor:
    """frames [n, C, H + 2, W + 2], taps [out, C, 3, 3] -> [n, out, H, W]."""
    n, _, height, width = frames.shape
    some_frames, some_channels = pieces(n, height - 2, width - 2, len(taps))
    given = [_joined([F.conv2d(x, w) for w in taps.split(some_channels)], 1) for x in frames.split(some_frames)]
    return _joined(given, 0)


def pieces(n: int, height: int, width: int, channels: int) -> tuple[int, int]:
    """How many frames and channels to convolve at a time, of n frames of height x width with `channels` to come out."""
    positions = n * height * width
    wide = channels > MANY and (channels > 4 * MANY or positions in FEW)
    low = channels >= MANY and positions in MIDDLE and height <= LOW
    return -(-n // 2) if low else n, MANY if wide else channels


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
