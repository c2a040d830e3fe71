"""The peak device memory of a decode, computed from the shapes of the decoder's allocations.

This module mirrors `decoder` step by step and must be changed together with its allocations. Frames are counted as
[height + 2, width + 2, C], their size in a window. Two tests check it: against the live bytes of a decode on meta
tensors, and against the peak that PyTorch reports on a GPU.
"""

import math
from functools import cache

from ...ops.attention import score_bytes
from ...ranks.devices import Device
from ..block_borders import AHEAD
from ..halo import IN_FLIGHT
from ..interface import Plan
from ..output import SLOTS
from ..regions import Region, blocks, hull, whole
from .weights import Weights

WORKSPACE = 256 * 2**20
"""Bytes allowed for the workspace of the convolution library and of the plain forms of kernels."""


def window_frames(n: int, m: int) -> int:
    """Return the frames in the window of a convolution of n frames in groups of m."""
    return (m + 2) * -(-n // m)


def product_frames(n: int, m: int) -> int:
    """Return the frames of products of a convolution of n frames in groups of m. The first frame is in no group."""
    return (m + 2) * (n // m) + n % m


@cache
def level_sizes(
    convs: tuple[int, ...], region: tuple[int, int], picture: tuple[int, int], grid: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return the largest height and width that a block computes at each level.

    convs: see `Weights.convs`. The region is placed in the middle of the picture; both are in latent positions.
    """
    top, left = ((picture[i] - region[i]) // 2 for i in (0, 1))
    if grid == (1, 1):
        extents = [whole(*region, convs)]
    else:
        place = Region(top, top + region[0], left, left + region[1])
        extents = [block for _, _, block in blocks(place, *grid, *picture, convs)]
    bounds = [[hull(level) for level in block] for block in extents]
    return [(max(b.height for b in level), max(b.width for b in level)) for level in zip(*bounds, strict=True)]


def peak_bytes(
    weights: Weights, region: tuple[int, int], picture: tuple[int, int], time: int, shared: bool, plan: Plan
) -> int:
    """Return the peak device memory of a decode in bytes: weights, caches, keys and values, working tensors.

    region, picture: height and width in latent positions. time: latent frames. shared: other ranks decode the rest of
    the picture.
    """
    size, steps, on_host = weights.dtype.itemsize, plan.steps, Device(weights.device).is_host

    def frame(level: int, height: int, width: int) -> int:
        return (height + 2) * (width + 2) * weights.widths[level] * size

    base = weights.nbytes + WORKSPACE
    waiting = IN_FLIGHT - 1 if shared else 0  # steps waiting for borders, each with its residual stream and window
    picture_frame = math.prod(picture) * weights.widths[0] * size

    # The trunk: caches, keys and values of the whole video, and the tensors of one step.
    n, latent = min(steps.trunk, time), frame(0, *region)
    convs = 2 * len(weights.mid) + 2 * len(weights.resnets[0])
    trunk = 2 * time * picture_frame + (2 * convs + 2) * latent
    trunk_working = (8 * n + waiting * (n + window_frames(n, weights.conv_in.m))) * latent
    if shared:
        trunk_working += 4 * n * picture_frame  # keys and values, gathered
    trunk_working += score_bytes(weights.device, math.prod(region), time * math.prod(picture))

    # The tail: caches and chunks between levels add up over the levels; only one level at a time has working tensors.
    waiting = 0 if plan.in_blocks else waiting
    only_chunk = time <= steps.trunk  # the first chunk has one frame less after each temporal upsampling
    tail = working = borders = 0
    incoming = n
    for level, sides in enumerate(level_sizes(weights.convs, region, picture, plan.blocks)):
        if 0 < level <= weights.full_rate_level:
            tail += incoming * frame(level, *sides)
        n = min(incoming, steps.of(level, weights.full_rate_level))
        m = weights.resnets[level][0].conv1.m if level else weights.conv_in.m
        window, products = window_frames(n, m), product_frames(n, m)
        here = frame(level, *sides)
        level_working = (n + window + products) * here
        convs = 2 * len(weights.resnets[level]) if level else 0
        if level < len(weights.upsamplers):
            convs += 1
            rate = 1 + weights.upsamplers[level].temporal
            doubled = 2 * sides[0], 2 * sides[1]
            packed = products * rate * frame(level + 1, *doubled)
            incoming = rate * n - (rate == 2 and only_chunk and n == incoming)
            out = incoming * frame(level + 1, *doubled)
            level_working = max(level_working, (n + window) * here + packed, n * here + packed + out)
        else:
            pixels = n * (sides[0] + 2) * (sides[1] + 2)
            level_working = max(level_working, 2 * n * here + pixels * (len(weights.taps) * size + 72))
            if not on_host:
                tail += SLOTS * pixels * 12  # float32 pixels being copied to the host
        tail += 2 * convs * here
        if plan.in_blocks:
            # Two rows and columns of each window and of the residual stream: all on the CPU, else those in flight.
            ends = (plan.blocks[0] > 1) * (sides[1] + 2), (plan.blocks[1] > 1) * (sides[0] + 2)
            pixel = 2 * weights.widths[level] * size
            if on_host:
                kept = weights.convs[level] * (1.5 + 2 / m) * weights.rates[level] * time
                borders += kept * (plan.blocks[1] * ends[0] + ends[1]) * pixel
            else:
                borders = max(borders, (2 * AHEAD + 2) * window * sum(ends) * pixel)
        stream_and_window = (n + window) * waiting * here
        if level < weights.full_rate_level:
            tail += stream_and_window
        else:
            level_working += stream_and_window
        working = max(working, level_working)

    if not plan.in_blocks:
        return int(base + trunk + tail + max(trunk_working, working))
    between = time * picture_frame  # the trunk's output, stored until all blocks are decoded
    return int(base + between + max(trunk + trunk_working, tail + borders + working))
