"""What blocks of one picture, decoded one after the other, hand on to each other.

A block ends where the next one, below it or to its right, begins. What it cannot know of those it computes itself, in
margins beyond its end (`regions.block_extents`). Those after it need no margin where they meet it: it keeps, beside
each convolution, the last row and column of its own, for them to put into their border. All blocks take the same
steps, so what one keeps in some order is what the next one asks for in that order.
"""

from collections import deque

from torch import Tensor

from .regions import Region


class Seams:
    """Rows and columns under way from block to block of a grid, which is gone through row by row."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.above: list[deque[Tensor]] = [deque() for _ in range(columns)]
        self.left: deque[Tensor] = deque()

    def edges(self, row: int, column: int, block: Region, extents: tuple[Region, ...]) -> "SeamEdges":
        """The edges (see `decoder.Edges`) of the block in that row and column, which computes `extents`."""
        return SeamEdges(self, row, column, block, extents)


class SeamEdges:
    """One block's `decoder.Edges`. Nothing is waited for."""

    lanes = 1

    def __init__(self, seams: Seams, row: int, column: int, block: Region, extents: tuple[Region, ...]) -> None:
        self.above = seams.above[column] if row > 0 else None
        self.below = seams.above[column] if row < seams.rows - 1 else None
        self.left = seams.left if column > 0 else None
        self.right = seams.left if column < seams.columns - 1 else None
        # Where in a window, with its border of one, the block's own last row and column are.
        self.last = [
            (block.bottom * 2**level - extent.top, block.right * 2**level - extent.left)
            for level, extent in enumerate(extents[:-1])
        ]

    def start(self, window: Tensor, level: int) -> "SeamEdges":
        """Put what earlier blocks kept into the border of `window`, [n, H + 2, W + 2, C]; keep what later ones need.

        A kept row reaches into the border at both ends, and a column into that of above and below: so corners travel.
        """
        row, column = self.last[level]
        if self.above is not None:
            window[:, 0] = self.above.popleft()
        if self.left is not None:
            window[:, :, 0] = self.left.popleft()
        if self.below is not None:
            self.below.append(window[:, row].clone())
        if self.right is not None:
            self.right.append(window[:, :, column].clone())
        return self

    def finish(self) -> None:
        """Everything was there at once."""
