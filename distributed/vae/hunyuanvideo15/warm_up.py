"""Compile the decoder's fused kernels ahead of the first decode."""

from itertools import pairwise

import torch
from torch import Tensor

from ...ops import kernels
from ...ops.winograd import Products
from .layout import TEMPORAL_UPSAMPLERS, Architecture
from .weights import TAP_ROWS, frames_per_group

CORNER = 1, 1
"""Row and column of the first pixel of frames in a window with a border of one."""


def warm_up(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> None:
    """Compile all kernels of a decoder of these sizes. Does nothing on devices without fused kernels.

    Each specialisation of a kernel is compiled when it is first called: 20 s in total on an H100 host, 2 s with
    Triton's cache on disk (2026-11-24). It uses a few kilobytes of device memory.
    """
    if kernels.are_fused(device):
        call_every_form(architecture, device, dtype)


@torch.inference_mode()
def call_every_form(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> None:
    """Call each specialisation of each kernel once, on one or two pixels."""

    def frames(channels: int, n: int = 1, border: int = 0) -> Tensor:
        return torch.zeros(n, 1 + border, 1 + border, channels, device=device, dtype=dtype)

    def vector(channels: int) -> Tensor:
        return torch.ones(channels, device=device)

    def products(channels: int, m: int, first: bool) -> Products:
        return Products(tuple(frames(channels) for _ in range(m + 2)), frames(channels) if first else None)

    def fill(channels: int, m: int, *, stream: bool = True, convolved: bool = True, norm: bool = True) -> None:
        one = vector(channels)
        x, given = frames(channels, m) if stream else None, products(channels, m, False) if convolved else None
        past, out = frames(channels, 2), frames(channels, m + 2, border=2)[:, None]
        bias, gamma = one if convolved else None, one if norm else None
        kernels.fill_groups(x, given, past, out, CORNER, first_chunk=True, bias=bias, gamma=gamma)

    widths = architecture.widths
    groups = [frames_per_group(2 ** min(level, TEMPORAL_UPSAMPLERS)) for level in range(len(widths))]
    fill(architecture.latent_channels, groups[0], convolved=False, norm=False)  # conv_in
    for level, (width, m) in enumerate(zip(widths, groups, strict=True)):
        fill(width, m)  # the first convolution of a residual block
        fill(width, m, convolved=False)  # the same without a preceding convolution
        fill(width, m, stream=False)  # the second convolution of a residual block
        if level < len(widths) - 1:
            fill(width, m, convolved=level > 0, norm=False)  # an upsampler's
    one, m = vector(widths[-1]), groups[-1]
    x, given, out = frames(widths[-1], m), products(widths[-1], m, False), frames(widths[-1], m, border=2)
    kernels.fill_window(x, given, out, CORNER, bias=one, gamma=one)
    for level, (width, following) in enumerate(pairwise(widths)):
        for first in (True, False):
            bias = vector(architecture.packed(level) * following)
            packed = products(len(bias), groups[level], first)
            x, temporal = frames(width, packed.shape[0]), level < TEMPORAL_UPSAMPLERS
            out = frames(following, len(x) * (1 + temporal) - (temporal and first), border=1)
            kernels.upsample(packed, bias, x, out, (0, 0), temporal=temporal, first=first)
    kernels.sum_taps(frames(TAP_ROWS, border=2), vector(3))
