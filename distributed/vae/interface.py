"""What the parts of a decode agree on: steps and plans, and how a decoder asks for the pixels around its region.

The planner, the decoder and the exchanges of borders import this module, and so need not import each other.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """How many frames are taken at a time: latent frames by the trunk, frames at the video's full rate by the tail.

    trunk is a multiple of 2 and tail of 4, so that no group of frames (see `ops.winograd`) is ever cut.
    """

    trunk: int
    tail: int

    def __post_init__(self) -> None:
        if min(self.trunk, self.tail) < 1 or self.trunk % 2 or self.tail % 4:
            raise ValueError(f"{self}: trunk must be a multiple of 2 and tail one of 4.")

    def of(self, level: int, full_rate_level: int) -> int:
        """Return how many frames a level takes at a time. `full_rate_level` is the first at the video's full rate.

        The levels between the trunk and that one take twice as many frames as the tail. They have few pixels, and would
        leave half of a large GPU idle (at 720x1280 in two blocks all convolutions of 1024 channels took 14 % less time
        with 8 frames here than with 4, H100, 2026-11-24).
        """
        if level == 0:
            return self.trunk
        return self.tail if level >= full_rate_level else 2 * self.tail


@dataclass(frozen=True)
class Plan:
    """How a rank goes through its region of the picture.

    blocks: rows and columns of the blocks into which the region is cut. With (1, 1) everything streams. Otherwise the
    trunk first goes through the whole region, then the tail through one block after the other (see `regions.blocks`).
    """

    steps: Steps
    blocks: tuple[int, int] = (1, 1)

    @property
    def in_blocks(self) -> bool:
        return self.blocks != (1, 1)


class Exchange(Protocol):
    """A border that is being fetched."""

    def finish(self) -> None:
        """Return when the border is in place for whatever is computed next."""


class Edges(Protocol):
    """What a region needs from its neighbours. See `halo.Halo` and `block_borders.BlockEdges`."""

    in_flight: int
    """How many steps may be in progress at once: one computes while the borders of the others travel."""

    def start(self, window: Tensor) -> Exchange:
        """Begin to fetch the border of `window`, [n, H + 2, W + 2, C], from the neighbours."""


class MovingEdges(Edges, Protocol):
    """What a block needs as well, because it moves over the picture with each convolution."""

    def move(self, frames: Tensor, by: int) -> None:
        """Fill in the first `by` rows and columns of `frames`, [n, H, W, C], which the block now covers."""


class WholeEdges(Edges, Protocol):
    """What the trunk needs as well: all regions are computed at the same time."""

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, [n, positions, C] each, of the whole picture."""

    @property
    def positions(self) -> int:
        """Latent positions of all regions together."""
