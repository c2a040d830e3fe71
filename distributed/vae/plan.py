"""The search for a plan: in which steps, and in how many blocks, a rank decodes its region of the picture.

All functions here are pure. Every rank computes the same plan from the same request, so ranks need not negotiate.
"""

import math
from itertools import product
from typing import TYPE_CHECKING

from .hunyuanvideo15.footprint import peak_bytes
from .interface import Plan, Steps
from .job import frame_count
from .regions import drift

if TYPE_CHECKING:
    from .hunyuanvideo15.weights import Weights

FULL_STEP = 12_500
"""Latent positions (frames x height x width) of a step that keeps a large GPU busy. Longer steps waste memory."""

LONGEST_STEP = 16
"""Latent frames in the longest step, for small pictures."""

USABLE = 0.95
"""Fraction of the free memory that a plan may use if a smaller plan exists. The rest is lost to fragmentation. With a
plan of 0.96, PyTorch's allocator reorganised its blocks 142 times and the decode took 11 % longer. A plan of 0.98 ran
out of memory; a plan of 0.86 had no problem (H100, 2026-11-24)."""


def choose_plan(
    weights: "Weights",
    region: tuple[int, int],
    picture: tuple[int, int],
    time: int,
    shared: bool,
    free: int,
    *,
    allow_blocks: bool = True,
) -> tuple[Plan | None, int]:
    """Return the plan for decoding a region of the picture within `free` bytes, and the bytes that it needs.

    A region that fits without blocks is not divided. Otherwise the plan with the fewest passes is chosen: blocks repeat
    no work, but a pass over few positions leaves a device partly idle (benchmarks/README.md, Memory).

    region, picture: height and width in latent positions. time: latent frames. shared: other ranks decode the rest of
    the picture. If even the smallest plan does not fit, the plan is None and the bytes are those of the smallest plan.
    """
    smallest = None, math.inf
    for plan in _plans(weights, region, time, allow_blocks):
        needed = peak_bytes(weights, region, picture, time, shared, plan)
        if needed <= USABLE * free:
            return plan, needed
        smallest = min(smallest, (plan, needed), key=lambda option: option[1])
    plan, needed = smallest
    return (plan if needed <= free else None), needed


def _plans(weights: "Weights", region: tuple[int, int], time: int, allow_blocks: bool) -> list[Plan]:
    """Return all plans, best first: no blocks, fewest passes, fewest blocks, longest steps, shortest lines.

    A pass is one step of one block, in the trunk or at the video's full frame rate. Lines separate the blocks.
    """
    # The lines move up and left by `drift`; every block must still have a position at the first convolution.
    smallest_side = drift(weights.convs) + 1
    rows, columns = ([n for n in range(1, side + 1) if n == 1 or side // n >= smallest_side] for side in region)

    def cost(plan: Plan) -> tuple[bool, int, int, int, int]:
        down, across = plan.blocks
        passes = down * across * (-(-time // plan.steps.trunk) + -(-frame_count(time) // plan.steps.tail))
        lines = (down - 1) * region[1] + (across - 1) * region[0]
        return plan.in_blocks, passes, down * across, -plan.steps.trunk, lines

    grids = product(rows, columns) if allow_blocks else [(1, 1)]
    plans = [Plan(Steps(n, max(4, n)), grid) for grid in grids for n in _steps_to_try(region, grid, time)]
    return sorted(plans, key=cost)


def _steps_to_try(region: tuple[int, int], blocks: tuple[int, int], time: int) -> list[int]:
    """Return step lengths for the trunk, longest first: powers of 2, up to the one that keeps a device busy."""
    positions = math.prod(-(-region[i] // blocks[i]) for i in (0, 1))
    wanted = min(-(-FULL_STEP // positions), LONGEST_STEP, time)
    doublings = (wanted - 1).bit_length()
    return [2**i for i in range(max(1, doublings), 0, -1)]
