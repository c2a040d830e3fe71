"""The search for a plan: in which steps, and in how many blocks, a rank decodes its region of the picture.

Everything here is a pure function of its arguments. Every rank computes the same plan from the same request, so nothing
is negotiated between them.
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
"""Latent positions (frames x height x width) of a step that keeps a large GPU busy. A larger one only costs memory."""

LONGEST_STEP = 16
"""Latent frames of a step of a small picture."""

USABLE = 0.95
"""Fraction of the free memory that a plan may need, if another plan needs less. The rest is lost between torch's
allocations: with 0.96 planned for, torch rearranged its memory 142 times and the decode took 11 % longer; with 0.98 it
ran out of memory; with 0.86 all went well (H100, 2026-11-24)."""


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
    """Return the plan by which a region of the picture is decoded within `free` bytes, and the bytes that it needs.

    If the region fits without blocks, it has none. Else the plan with the fewest passes is taken: blocks repeat no
    work, but a pass over few positions leaves a device partly idle (benchmarks/README.md, Memory).

    region, picture: height and width in latent positions. time: latent frames. shared: other ranks decode the rest of
    the picture. If not even the smallest plan fits, the plan is None and the bytes are those that it would need.
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
    """All plans, the best first: no blocks, fewest passes, fewest blocks, longest steps, shortest lines between blocks.

    A pass is one step of one block, of the trunk or at the video's full frame rate.
    """
    # The lines between blocks move up and left by `drift`, and the last block must still have a position.
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
    """Lengths of the trunk's steps, the longest first: powers of 2, up to what keeps a device busy with one block."""
    positions = math.prod(-(-region[i] // blocks[i]) for i in (0, 1))
    wanted = min(-(-FULL_STEP // positions), LONGEST_STEP, time)
    doublings = (wanted - 1).bit_length()
    return [2**i for i in range(max(1, doublings), 0, -1)]
