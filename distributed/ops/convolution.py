"""A 2D convolution, split for shapes for which cuDNN is known to choose a slow algorithm.

cuDNN chooses its algorithm by the shape. On an H100 some shapes take two to six times as long as similar ones (cuDNN
9.19, 668 shapes, 2026-11-24). All slow shapes have at least 1024 output channels, and a number of output positions
(frames x height x width) in the ranges below. cuDNN's own algorithm search does not find a fast algorithm. Timing at
run time would make processes choose differently, so that their results differ in the last bits.

The ranges apply to the GPUs on which they were measured, of compute capability 9.0. On all other devices a convolution
is one call.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ranks.devices import Device

MEASURED = (9, 0)
"""Compute capability of the GPUs on which the ranges were measured (H100, H200)."""

MANY = 1024
"""Output channels. More than these are slow with `FEW` positions, and more than 4096 with any number."""

FEW = range(5_700, 8_200)
"""Positions at which 2048 and 4096 output channels take twice as long."""

MIDDLE, LOW = range(31_000, 53_000), 43
"""Positions at which frames of at most `LOW` rows take three times as long, with 1024 or more output channels."""


def conv2d(frames: Tensor, taps: Tensor) -> Tensor:
    """Convolve frames [n, C, H + 2, W + 2] with taps [out, C, 3, 3], without padding. Returns [n, out, H, W]."""
    if not is_measured(frames.device):
        return F.conv2d(frames, taps)
    n, _, height, width = frames.shape
    some_frames, some_channels = pieces(n, height - 2, width - 2, len(taps))
    given = [_joined([F.conv2d(x, w) for w in taps.split(some_channels)], 1) for x in frames.split(some_frames)]
    return _joined(given, 0)


@cache
def is_measured(device: torch.device) -> bool:
    """Return whether the ranges above apply to this device: an NVIDIA GPU of compute capability 9.0, with cuDNN."""
    return Device(device).compute_capability == MEASURED and torch.backends.cudnn.is_available()


def pieces(n: int, height: int, width: int, channels: int) -> tuple[int, int]:
    """Return the numbers of frames and output channels to convolve at a time.

    The whole output has n frames of height x width positions and `channels` channels.
    """
    positions = n * height * width
    wide = channels > MANY and (channels > 4 * MANY or positions in FEW)
    low = channels >= MANY and positions in MIDDLE and height <= LOW
    return -(-n // 2) if low else n, MANY if wide else channels


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]
