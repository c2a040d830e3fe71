"""Rectangles of the picture: which rank has which, and what a block needs beyond itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product


@dataclass(frozen=True)
class Region:
    """A rectangle of positions: rows [top, bottom), columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left


@dataclass(frozen=True)
class Division:
    """The picture divided into rows x columns regions, one for each of the first rows * columns ranks."""

    row_cuts: tuple[int, ...]
    column_cuts: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.row_cuts) - 1

    @property
    def columns(self) -> int:
        return len(self.column_cuts) - 1

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def regions(self) -> list[Region]:
        """All regions, in the order of their ranks."""
        return [self.region(index) for index in range(self.size)]

    @property
    def largest(self) -> Region:
        """The region that takes longest."""
        return max(self.regions, key=lambda region: region.height * region.width)

    def region(self, index: int) -> Region:
        """The region of rank `index`; regions are numbered row by row."""
        row, column = divmod(index, self.columns)
        return Region(
            self.row_cuts[row], self.row_cuts[row + 1], self.column_cuts[column], self.column_cuts[column + 1]
        )


def cuts(start: int, stop: int, parts: int) -> tuple[int, ...]:
    """Where to cut the positions from `start` to `stop` into `parts` runs that differ by at most one position."""
    return tuple(start + (stop - start) * part // parts for part in range(parts + 1))


def divide(height: int, width: int, world_size: int) -> Division:
    """Divide a latent of height x width between at most `world_size` ranks.

    Time follows the largest region, so that decides; then, since borders travel, the least length of cuts. A picture
    too small to give every rank a position leaves some ranks without one.
    """
    options = [
        (rows, columns)
        for rows in range(1, min(height, world_size) + 1)
        for columns in range(1, min(width, world_size // rows) + 1)
    ]

    def cost(option: tuple[int, int]) -> tuple[int, int, int]:
        rows, columns = option
        largest = math.ceil(height / rows) * math.ceil(width / columns)
        return largest, (rows - 1) * width + (columns - 1) * height, rows

    rows, columns = min(options, key=cost)
    return Division(cuts(0, height, rows), cuts(0, width, columns))


def whole(height: int, width: int, levels: int) -> tuple[Region, ...]:
    """What is computed at each level, and of the pixels, where nothing is cut off. height x width: latent positions."""
    scales = [2**level for level in range(levels)]
    extents = tuple(Region(0, height * scale, 0, width * scale) for scale in scales)
    return (*extents, extents[-1])


def blocks(region: Region, rows: int, columns: int) -> list[tuple[int, int, Region]]:
    """A region cut into rows x columns blocks, row by row: the row, the column and the block of each."""
    across, down = pairwise(cuts(region.left, region.right, columns)), pairwise(cuts(region.top, region.bottom, rows))
    places = product(enumerate(down), enumerate(across))
    return [(row, column, Region(*vertical, *horizontal)) for (row, vertical), (column, horizontal) in places]


def block_extents(
    block: Region, height: int, width: int, margins: Sequence[int], *, above: bool, left: bool
) -> tuple[Region, ...]:
    """What is computed at each level for one block of a picture of height x width latent positions.

    `margins` are how far beyond the block each level must begin, in its own pixels (see `Weights.margins`); they end
    where the picture does. above, left: there is a block from which seams come, and no margin is needed (see `seams`).
    The last of the regions is the block's own pixels.
    """

    def grown(level: int, margin: int) -> Region:
        scale = 2**level
        return Region(
            max(0, block.top * scale - (0 if above else margin)),
            min(height * scale, block.bottom * scale + margin),
            max(0, block.left * scale - (0 if left else margin)),
            min(width * scale, block.right * scale + margin),
        )

    return (*(grown(level, margin) for level, margin in enumerate(margins)), grown(len(margins) - 1, 0))
