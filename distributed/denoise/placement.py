"""Which weights of the transformer stay on the device, as a pure function of sizes and of free memory.

In order of speed, the choices are:

1. All weights stay on the device.
2. The modulation's weights stay in host memory. They pass through the device once per timestep.
3. As many blocks as fit stay on the device. The others are streamed: their weights are copied for each forward while
   the block before computes (`stream`).
4. All blocks are streamed.
"""

import math
from functools import cache
from typing import NamedTuple

import torch

from .block import MLP_TOKENS
from .layout import Architecture, block_of, modulates
from .parallel import Layout

KEPT_STEPS = 64
"""Timesteps whose modulation is kept: 2.7 MB each at full size in 16 bits."""
WORKSPACE = 2**27
"""Bytes that libraries take."""
ROWS_ALONE, ROWS_SHARED = 7, 10
"""Tensors of a rank's own tokens that a block has at once, at the most. Measured on H100: 6.4 alone, 9.4 with two ranks
that divide the heads. Two that gather keys and values have 8: tokens, norm, two times keys, two times values, queries
and the result of attention."""

SLOTS = 2
"""Places on the device for the weights of streamed blocks: of the block that computes, and of the next one."""


class Placement(NamedTuple):
    """The weights that stay on the device. Weights outside of blocks and modulation always do.

    modulated: whether the modulation's weights do. resident: the number of blocks that do, of `blocks` blocks.
    """

    modulated: bool
    resident: int
    blocks: int

    @property
    def streamed(self) -> tuple[int, ...]:
        """The blocks that are streamed. They are spread evenly, the last of each stretch, so that copies have time."""
        return tuple(filter(self._streams, range(self.blocks)))

    @property
    def slots(self) -> int:
        """The number of places for streamed blocks on the device."""
        return min(SLOTS, self.blocks - self.resident)

    def keeps(self, name: str) -> bool:
        """Return whether a weight, by its name in diffusers' layout, stays on the device."""
        if modulates(name):
            return self.modulated
        block, _ = block_of(name)
        return block is None or not self._streams(block)

    def _streams(self, block: int) -> bool:
        count = self.blocks - self.resident
        return (block + 1) * count // self.blocks > block * count // self.blocks


class Sizes(NamedTuple):
    """Bytes that a step uses on a device.

    computation: all but weights. fixed: weights outside of blocks and modulation. block: the weights of one block,
    without its modulation, of `blocks` blocks of equal size.
    """

    computation: int
    fixed: int
    modulation: int
    block: int
    blocks: int

    def weights(self, placement: Placement) -> int:
        """Return the bytes of the weights on the device, with the places for streamed blocks."""
        blocks = self.block * (placement.resident + placement.slots)
        return self.fixed + blocks + (self.modulation if placement.modulated else 0)

    def needed(self, placement: Placement) -> int:
        """Return the bytes that a step uses with this placement of the weights."""
        return self.computation + self.weights(placement)

    @property
    def fastest(self) -> Placement:
        """The placement of all weights on the device."""
        return Placement(True, self.blocks, self.blocks)

    @property
    def smallest(self) -> Placement:
        """The placement of all modulation and blocks in host memory."""
        return Placement(False, 0, self.blocks)

    def choose(self, free: int) -> Placement:
        """Return the fastest placement whose step fits in `free` bytes, or the smallest one if no step fits."""
        choices = [self.fastest, Placement(False, self.blocks, self.blocks)]
        choices += [Placement(False, resident, self.blocks) for resident in reversed(range(self.blocks))]
        return next((choice for choice in choices if self.needed(choice) <= free), self.smallest)


def sizes_of(architecture: Architecture, dtype: torch.dtype, layout: Layout | None) -> Sizes:
    """Return the bytes that a step uses on the busiest rank of a layout. No layout: those of the weights alone."""
    computation = 0
    if layout is not None:
        tokens, ranks = max((max(split.tokens), len(split.ranks)) for split in layout.branches)
        rows = tokens * (ROWS_ALONE if ranks == 1 else ROWS_SHARED) * architecture.width
        mlp = min(tokens, MLP_TOKENS) * int((1 + architecture.mlp_ratio) * architecture.width)
        kept = KEPT_STEPS * 12 * architecture.layers * architecture.width
        computation = (rows + mlp + kept) * dtype.itemsize + WORKSPACE
    return Sizes(computation, *(dtype.itemsize * numbers for numbers in _parameters(architecture)), architecture.layers)


@cache
def _parameters(architecture: Architecture) -> tuple[int, int, int]:
    """Return the number of parameters outside of blocks and modulation, in the modulation, and in one block."""
    fixed = modulation = block = 0
    for name, shape in architecture.shapes().items():
        if modulates(name):
            modulation += math.prod(shape)
        elif block_of(name)[0] is None:
            fixed += math.prod(shape)
        elif block_of(name)[0] == 0:
            block += math.prod(shape)
    return fixed, modulation, block
