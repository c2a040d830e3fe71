"""A convolution of pictures, split where cuDNN is known to choose a slow algorithm.

cuDNN chooses its algorithm by the shape. On an H100 it takes two to six times as long for some shapes as for similar
ones (cuDNN 9.19, 668 shapes, 2026-11-24). None of these has fewer than 1024 output channels, and all of them are in the
ranges below, which count output positions: frames times height times width. cuDNN's own search does not find the fast
algorithm. Measuring at run time would make processes choose differently, and so differ in the last bits.

The ranges hold for the GPUs on which they were measured, those of compute capability 9.0. Everywhere else a
convolution is one call.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ranks.devices import Device

MEASURED = (9, 0)
"""The compute capability of the GPUs that the ranges were measured on (H100, H200)."""

MANY = 1024
"""Output channels. More than these are slow in `FEW`, and more than 4096 everywhere; 1024 are not."""

FEW = range(5_700, 8_200)
"""Positions at which 2048 and 4096 output channels take twice as long."""

MIDDLE, LOW = range(31_000, 53_000), 43
"""Positions at which pictures of at most `LOW` rows take three times as long, with 1024 output channels or more."""


def conv2d(frames: Tensor, taps: Tensor) -> Tensor:
    """frames [n, C, H + 2, W + 2], taps [out, C, 3, 3] -> [n, out, H, W]."""
    if not is_measured(frames.device):
        return F.conv2d(frames, taps)
    n, _, height, width = frames.shape
    some_frames, some_channels = pieces(n, height - 2, width - 2, len(taps))
    given = [_joined([F.conv2d(x, w) for w in taps.split(some_channels)], 1) for x in frames.split(some_frames)]
    return _joined(given, 0)


@cache
def is_measured(device: torch.device) -> bool:
    """Whether the ranges above hold for this device: an NVIDIA GPU of the measured kind, with cuDNN."""
    return Device(device).compute_capability == MEASURED and torch.backends.cudnn.is_available()


def pieces(n: int, height: int, width: int, channels: int) -> tuple[int, int]:
    """Return how many frames and output channels to convolve at a time.

    n frames of height x width positions are the whole output, with so many `channels`.
    """
    positions = n * height * width
    wide = channels > MANY and (channels > 4 * MANY or positions in FEW)
    low = channels >= MANY and positions in MIDDLE and height <= LOW
    return -(-n // 2) if low else n, MANY if wide else channels


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]
