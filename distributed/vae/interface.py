"""Types shared by the parts of a decode: steps, plans, and how a decoder requests the pixels around its region.

The planner, the decoder and the border exchanges import this module, so that they need not import each other.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """Step lengths: latent frames per step of the trunk, frames at the video's full rate per step of the tail.

    trunk is a multiple of 2 and tail a multiple of 4, so that no group of frames (see `ops.winograd`) is ever split.
    """

    trunk: int
    tail: int

    def __post_init__(self) -> None:
        if min(self.trunk, self.tail) < 1 or self.trunk % 2 or self.tail % 4:
            raise ValueError(f"{self}: trunk must be a multiple of 2 and tail one of 4.")

    def of(self, level: int, full_rate_level: int) -> int:
        """Return the frames per step of a level. `full_rate_level` is the first level at the video's full rate.

        The levels between the trunk and that level use steps twice as long as the tail's. They have few pixels and
        would otherwise leave half of a large GPU idle (720x1280 in two blocks: all convolutions of 1024 channels took
        14 % less time with 8 frames here than with 4, H100, 2026-11-24).
        """
        if level == 0:
            return self.trunk
        return self.tail if level >= full_rate_level else 2 * self.tail


@dataclass(frozen=True)
class Plan:
    """In which steps and blocks a rank decodes its region of the picture.

    blocks: rows and columns of the blocks into which the region is divided. With (1, 1) trunk and tail stream.
    Otherwise the trunk first decodes all frames of the region, then the tail decodes one block after the other (see
    `regions.blocks`).
    """

    steps: Steps
    blocks: tuple[int, int] = (1, 1)

    @property
    def in_blocks(self) -> bool:
        return self.blocks != (1, 1)


class Exchange(Protocol):
    """A border exchange in flight."""

    def finish(self) -> None:
        """Wait until the border is filled, or make the work launched after this call wait for it."""


class Edges(Protocol):
    """How a region obtains its neighbours' pixels. See `halo.Halo` and `block_borders.BlockEdges`."""

    in_flight: int
    """Number of steps in progress at once: one computes while the borders of the others are in flight."""

    def start(self, window: Tensor) -> Exchange:
        """Start filling the border of `window`, [n, H + 2, W + 2, C], from the neighbours."""


class MovingEdges(Edges, Protocol):
    """The edges of a block, which also moves over the picture with each convolution."""

    def move(self, frames: Tensor, by: int) -> None:
        """Fill the first `by` rows and columns of `frames`, [n, H, W, C], which the block now covers."""


class WholeEdges(Edges, Protocol):
    """The edges of the trunk, which also needs the keys and values of all regions."""

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, [n, positions, C] each, of the whole picture."""

    @property
    def positions(self) -> int:
        """Latent positions of the whole picture."""
