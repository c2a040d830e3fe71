"""Rectangles of the picture: which rank has which, and what a block reads beyond its own pixels."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
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
        """The region that takes the most time."""
        return max(self.regions, key=lambda region: region.height * region.width)

    def region(self, index: int) -> Region:
        """The region of rank `index`; regions are numbered row by row."""
        row, column = divmod(index, self.columns)
        return Region(
            self.row_cuts[row], self.row_cuts[row + 1], self.column_cuts[column], self.column_cuts[column + 1]
        )


def cuts(start: int, stop: int, count: int) -> tuple[int, ...]:
    """Return the bounds of `count` runs of the positions from `start` to `stop`. Their lengths differ by at most
    one."""
    return tuple(start + (stop - start) * i // count for i in range(count + 1))


def divide(height: int, width: int, world_size: int) -> Division:
    """Divide a latent of height x width between at most `world_size` ranks.

    The largest region determines the time, so it is made as small as possible. Of the divisions with the same largest
    region the one with the shortest cuts is taken, because borders travel. If the picture is too small to give every
    rank a position, some ranks have none.
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


Extents = tuple[tuple[Region, ...], ...]
"""What is computed, level by level: the region that each convolution reads and, last, the one that the last one
gives."""

Line = tuple[tuple[int, ...], ...]
"""One side of `Extents`: a row or a column for each of its regions."""


def hull(regions: Iterable[Region]) -> Region:
    """Return the smallest region that contains all of them."""
    tops, bottoms, lefts, rights = zip(*(astuple(region) for region in regions), strict=True)
    return Region(min(tops), max(bottoms), min(lefts), max(rights))


def whole(height: int, width: int, convs: Sequence[int]) -> Extents:
    """Return the extents of a picture of height x width latent positions, or of a region whose borders others fill in.

    convs: convolutions of each level (see `Weights.convs`).
    """
    return tuple(
        (Region(0, height * 2**level, 0, width * 2**level),) * (count + 1) for level, count in enumerate(convs)
    )


def blocks(
    region: Region, rows: int, columns: int, height: int, width: int, convs: Sequence[int]
) -> list[tuple[int, int, Extents]]:
    """Cut a region of a picture of height x width latent positions into rows x columns blocks.

    Returns the row, the column and the extents of each, row by row. A convolution reads one pixel beyond what it gives.
    Towards a later block there is none to read, so the convolution gives one pixel less, and the later block computes
    it. So nothing is computed twice (see `block_borders`). From the first convolution to the pixels the line between
    two blocks moves up and left by `drift` latent positions. Towards the regions of other ranks a block reads as much
    more as its own pixels need.
    """
    down = _spans(region.top, region.bottom, rows, height, convs)
    across = _spans(region.left, region.right, columns, width, convs)
    return [
        (row, column, _between(*down[row], *across[column])) for row, column in product(range(rows), range(columns))
    ]


def drift(convs: Sequence[int]) -> int:
    """Return the receptive field's radius: how far the input reaches beyond the pixels, in latent positions, rounded
    up."""
    scale = 2 ** (len(convs) - 1)
    return -(-sum(count * scale // 2**level for level, count in enumerate(convs)) // scale)


def _spans(start: int, stop: int, count: int, side: int, convs: Sequence[int]) -> list[tuple[Line, Line]]:
    """Where each of `count` blocks of the positions from `start` to `stop` begins and ends. The picture has `side`."""
    between = (_cut(cut + drift(convs), convs) for cut in cuts(start, stop, count)[1:-1])
    return list(pairwise([_reach(start, -1, side, convs), *between, _reach(stop, 1, side, convs)]))


def _cut(at: int, convs: Sequence[int]) -> Line:
    """The line between two blocks. It is before latent position `at` at the first convolution, and moves from there."""
    line = []
    for count in convs:
        line.append(tuple(at - done for done in range(count + 1)))
        at = 2 * line[-1][-1]
    return tuple(line)


def _reach(at: int, step: int, side: int, convs: Sequence[int]) -> Line:
    """How far each convolution reads for pixels to end at latent position `at`: `step` more each, within the
    picture."""
    line, end = [], at * 2 ** (len(convs) - 1)
    for level, count in reversed(tuple(enumerate(convs))):
        line.append(tuple(min(max(0, end + step * left), side * 2**level) for left in range(count, -1, -1)))
        end = -(-line[-1][0] // 2) if step > 0 else line[-1][0] // 2
    return tuple(reversed(line))


def _between(top: Line, bottom: Line, left: Line, right: Line) -> Extents:
    return tuple(tuple(map(Region, *sides)) for sides in zip(top, bottom, left, right, strict=True))
