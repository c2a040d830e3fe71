"""From (latent shape, mode, ranks, memory) to who decodes what.

Everything here is a pure function of its arguments. Every rank computes the same plan from the same job, so nothing
is negotiated between them.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING

from ..ops.attention import score_bytes
from .hunyuanvideo15.decoder import LANES, Steps
from .job import frame_count
from .regions import Region, blocks, drift, hull, whole
from .seams import AHEAD

if TYPE_CHECKING:
    from .hunyuanvideo15.decoder import Weights

FULL_STEP = 12_500
"""Latent positions (frames x height x width) of a step that keeps a large GPU busy; a larger one only costs memory."""

LONGEST_STEP = 16
"""Latent frames of a step of a small picture."""

ROOM = 0.95
"""How much of the free memory a plan may need, if another one needs less. What is between torch's blocks of memory is
the rest: with 0.96 of it planned for, torch rearranged them 142 times and took 11 % longer, with 0.98 it found no
place, with 0.86 all went well (H100, 2026-11-24)."""

WORKSPACE = 256 * 2**20
"""What the convolution library may want beside what is counted here."""


@dataclass(frozen=True)
class Plan:
    """How a rank goes through its part of the picture.

    blocks: (1, 1), and everything streams; else rows and columns of the blocks into which the part is cut for the
    tail, one after the other, once the trunk has gone through the whole part (see `regions.blocks`).
    """

    steps: Steps
    blocks: tuple[int, int] = (1, 1)


def choose_plan(
    weights: "Weights",
    part: tuple[int, int],
    picture: tuple[int, int],
    time: int,
    divided: bool,
    free: int,
    undivided: bool = False,
) -> tuple[Plan | None, int]:
    """The plan by which a part of the picture is decoded within `free` bytes.

    Undivided where that fits. Else whatever takes fewest passes: blocks compute nothing twice, but a pass over few
    positions leaves a device partly idle (benchmarks/README.md, Memory).

    part, picture: height and width in latent positions; divided: other ranks decode the rest; undivided: no blocks are
    to be made. Returns the plan, or None where not even the least needy fits, and the bytes that it needs (see
    `peak_bytes`).
    """
    tightest = None, math.inf
    for plan in _plans(weights, part, time, undivided):
        needed = peak_bytes(weights, part, picture, time, divided, plan)
        if needed <= ROOM * free:
            return plan, needed
        tightest = min(tightest, (plan, needed), key=lambda option: option[1])
    plan, needed = tightest
    return (plan if needed <= free else None), needed


def _plans(weights: "Weights", part: tuple[int, int], time: int, undivided: bool) -> list[Plan]:
    """The best first: undivided, fewest passes, fewest blocks, longest steps of the trunk, shortest lines between them.

    Passes are the steps of all blocks: at latent resolution and at the video's own frame rate.
    """
    least = drift(weights.convs) + 1  # by so much lines move up and left, and the last block still has a position
    rows, columns = ([n for n in range(1, side + 1) if n == 1 or side // n >= least] for side in part)

    def cost(plan: Plan) -> tuple[bool, int, int, int, int]:
        down, across = plan.blocks
        passes = down * across * (-(-time // plan.steps.trunk) + -(-frame_count(time) // plan.steps.tail))
        lines = (down - 1) * part[1] + (across - 1) * part[0]
        return plan.blocks != (1, 1), passes, down * across, -plan.steps.trunk, lines

    grids = [(1, 1)] if undivided else product(rows, columns)
    plans = [Plan(Steps(n, max(4, n)), grid) for grid in grids for n in _steps_to_try(part, grid, time)]
    return sorted(plans, key=cost)


def _positions(part: tuple[int, int], blocks: tuple[int, int]) -> int:
    """Latent positions of a block."""
    return math.prod(-(-part[i] // blocks[i]) for i in (0, 1))


def _steps_to_try(part: tuple[int, int], blocks: tuple[int, int], time: int) -> list[int]:
    wanted = min(-(-FULL_STEP // _positions(part, blocks)), LONGEST_STEP, time)
    doublings = (wanted - 1).bit_length()
    return [2**i for i in range(max(1, doublings), 0, -1)]


@cache
def _sizes(
    convs: tuple[int, ...], part: tuple[int, int], picture: tuple[int, int], grid: tuple[int, int]
) -> list[tuple[int, int]]:
    """Height and width of the most that a block computes at each level; the part lies in the middle of the picture."""
    top, left = ((picture[i] - part[i]) // 2 for i in (0, 1))
    region = Region(top, top + part[0], left, left + part[1])
    if grid == (1, 1):
        extents = [whole(*part, convs)]
    else:
        extents = [block for _, _, block in blocks(region, *grid, *picture, convs)]
    rooms = [[hull(level) for level in block] for block in extents]
    return [
        (max(room.height for room in level), max(room.width for room in level)) for level in zip(*rooms, strict=True)
    ]


def peak_bytes(
    weights: "Weights", part: tuple[int, int], picture: tuple[int, int], time: int, divided: bool, plan: Plan
) -> int:
    """Bytes on the device at the fullest moment of a decode: weights, windows, keys and values, working tensors."""
    size, steps, undivided = weights.dtype.itemsize, plan.steps, plan.blocks == (1, 1)

    def frame(level: int, height: int, width: int) -> int:
        return (height + 2) * (width + 2) * weights.widths[level] * size

    base = weights.nbytes + WORKSPACE
    latent = frame(0, *part)
    convs = 2 * len(weights.mid) + 2 * len(weights.blocks[0])
    waiting = LANES - 1 if divided else 0  # steps under way that wait their turn: a stream and a window
    trunk = 2 * time * math.prod(picture) * weights.widths[0] * size + (2 * convs + 2) * latent
    trunk_step = min(steps.trunk, time + time % 2)
    trunk_working = (8 + 3 * waiting) * trunk_step * latent
    if divided:
        trunk_working += 4 * trunk_step * math.prod(picture) * weights.widths[0] * size  # keys and values, gathered
    trunk_working += score_bytes(weights.device, math.prod(part), time * math.prod(picture))
    waiting = waiting if undivided else 0
    tail = working = seams = 0
    handed = trunk_step
    for level, sides in enumerate(_sizes(weights.convs, part, picture, plan.blocks)):
        if 0 < level <= weights.flat:  # what the level before handed on waits its turn
            tail += handed * frame(level, *sides)
        n = min(handed, steps.of(level, weights.flat))
        here = n * frame(level, *sides)
        group = (weights.blocks[level][0].conv1 if level else weights.conv_in).group
        grown = 1 + 2 / group  # what a convolution reads and what it gives, in frames for each frame
        level_working = (1 + 2 * grown) * here
        convs = 2 * len(weights.blocks[level]) if level else 0
        if level < len(weights.upsamplers):
            convs += 1
            handed = (1 + weights.upsamplers[level].temporal) * n
            out = handed * frame(level + 1, 2 * sides[0], 2 * sides[1])
            level_working = max(level_working, (1 + grown) * here + grown * out, here + (grown + 1) * out)
        else:
            pixels = n * (sides[0] + 2) * (sides[1] + 2)
            level_working = max(level_working, 2 * here + pixels * (len(weights.taps) * size + 72))
        tail += 2 * convs * frame(level, *sides)
        if not undivided:  # two rows and columns of each window and of the stream, as many as wait on the device
            ends = (plan.blocks[0] > 1) * (sides[1] + 2), (plan.blocks[1] > 1) * (sides[0] + 2)
            pixel = 2 * weights.widths[level] * size
            if weights.device.type == "cpu":
                kept = weights.convs[level] * (grown + 0.5) * weights.rates[level] * time
                seams += kept * (plan.blocks[1] * ends[0] + ends[1]) * pixel
            else:
                seams = max(seams, (2 * AHEAD + 2) * grown * n * sum(ends) * pixel)
        if level < weights.flat:
            tail += (1 + grown) * waiting * here
        else:
            level_working += (1 + grown) * waiting * here
        working = max(working, level_working)
    if undivided:
        return int(base + trunk + tail + max(trunk_working, working))
    between = time * math.prod(picture) * weights.widths[0] * size
    return int(base + between + max(trunk + trunk_working, tail + seams + working))
