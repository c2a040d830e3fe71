"""Rectangles of the picture: the region of each rank, and the extents that a block computes."""

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
        """All regions in rank order."""
        return [self.region(index) for index in range(self.size)]

    @property
    def largest(self) -> Region:
        """The region with the most positions, which takes the most time."""
        return max(self.regions, key=lambda region: region.height * region.width)

    def region(self, index: int) -> Region:
        """Return the region of rank `index`. Regions are numbered row by row."""
        row, column = divmod(index, self.columns)
        return Region(
            self.row_cuts[row], self.row_cuts[row + 1], self.column_cuts[column], self.column_cuts[column + 1]
        )


def cuts(start: int, stop: int, count: int) -> tuple[int, ...]:
    """Return the bounds that divide the positions from `start` to `stop` into `count` runs, of lengths that differ by
    at most one."""
    return tuple(start + (stop - start) * i // count for i in range(count + 1))


def divide(height: int, width: int, world_size: int) -> Division:
    """Divide a latent of height x width between at most `world_size` ranks.

    The largest region determines the time, so it is made as small as possible. Among divisions with the same largest
    region the one with the shortest cuts is chosen, because borders along the cuts are exchanged. If the picture has
    too few positions, some ranks get no region.
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
"""The regions computed at each level: the input region of each convolution, then the output region of the last
convolution."""

Line = tuple[tuple[int, ...], ...]
"""One side of `Extents`: the row or column at which each of its regions begins or ends."""


def hull(regions: Iterable[Region]) -> Region:
    """Return the smallest region that contains all of them."""
    tops, bottoms, lefts, rights = zip(*(astuple(region) for region in regions), strict=True)
    return Region(min(tops), max(bottoms), min(lefts), max(rights))


def whole(height: int, width: int, convs: Sequence[int]) -> Extents:
    """Return the extents of a whole picture of height x width latent positions, or of a region with exchanged borders.

    convs: number of convolutions per level (see `Weights.convs`).
    """
    return tuple(
        (Region(0, height * 2**level, 0, width * 2**level),) * (count + 1) for level, count in enumerate(convs)
    )


def blocks(
    region: Region, rows: int, columns: int, height: int, width: int, convs: Sequence[int]
) -> list[tuple[int, int, Extents]]:
    """Divide a region of a picture of height x width latent positions into rows x columns blocks.

    Returns the row, column and extents of each block, row by row. A convolution reads one pixel more on each side than
    it computes. On the side of a later block that pixel is not available, so the convolution computes one pixel less,
    and the later block computes it. Nothing is computed twice (see `block_borders`). From the first convolution to the
    pixels, the line between two blocks moves up and left by `drift` latent positions. On the sides of other ranks'
    regions a block reads the full receptive field of its own pixels.
    """
    down = _spans(region.top, region.bottom, rows, height, convs)
    across = _spans(region.left, region.right, columns, width, convs)
    return [
        (row, column, _between(*down[row], *across[column])) for row, column in product(range(rows), range(columns))
    ]


def drift(convs: Sequence[int]) -> int:
    """Return the radius of the tail's receptive field in latent positions, rounded up."""
    scale = 2 ** (len(convs) - 1)
    return -(-sum(count * scale // 2**level for level, count in enumerate(convs)) // scale)


def _spans(start: int, stop: int, count: int, side: int, convs: Sequence[int]) -> list[tuple[Line, Line]]:
    """Return the two lines of each of `count` blocks of the positions `start` to `stop`, in a picture of `side`."""
    between = (_cut(cut + drift(convs), convs) for cut in cuts(start, stop, count)[1:-1])
    return list(pairwise([_reach(start, -1, side, convs), *between, _reach(stop, 1, side, convs)]))


def _cut(at: int, convs: Sequence[int]) -> Line:
    """Return the line between two blocks, which starts before latent position `at` at the first convolution."""
    line = []
    for count in convs:
        line.append(tuple(at - done for done in range(count + 1)))
        at = 2 * line[-1][-1]
    return tuple(line)


def _reach(at: int, step: int, side: int, convs: Sequence[int]) -> Line:
    """Return the line of inputs for pixels that end at latent position `at`: each convolution reads one pixel further
    in direction `step`, within the picture."""
    line, end = [], at * 2 ** (len(convs) - 1)
    for level, count in reversed(tuple(enumerate(convs))):
        line.append(tuple(min(max(0, end + step * left), side * 2**level) for left in range(count, -1, -1)))
        end = -(-line[-1][0] // 2) if step > 0 else line[-1][0] // 2
    return tuple(reversed(line))


def _between(top: Line, bottom: Line, left: Line, right: Line) -> Extents:
    return tuple(tuple(map(Region, *sides)) for sides in zip(top, bottom, left, right, strict=True))
