"""The borders that blocks of one picture, decoded one after the other, leave for each other.

A block ends where the next one, below it or to its right, begins. That line moves by one pixel with each convolution
(see `regions.blocks`). Of everything that a block reads, the next one needs the last two rows or columns to continue
from there. So nothing is computed twice, but those rows and columns have to be kept, for all frames, until the next
block's turn. They wait in host memory. Copies to it and back run on a stream of their own while the device computes.

All blocks take the same steps, so a block asks for the pieces in the order in which the one before kept them.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ranks.devices import Device, host_memory

CHUNK = 64 * 2**20
"""Bytes of host memory that are allocated at a time."""

AHEAD = 4
"""Prefetch depth: pieces copied to the device before they are needed, and copies to the host that may be in flight."""


@dataclass
class BlockBorder:
    """What one block keeps for another, in the order in which the other asks for it."""

    kept: deque[Tensor] = field(default_factory=deque)
    """In host memory."""
    prefetched: deque[tuple[Tensor, torch.Event]] = field(default_factory=deque)
    """On the device, each once its event has come."""


class BlockBorders:
    """The borders of a grid of blocks, which is gone through row by row, and the copies to host memory and back."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.rows, self.columns, self.device = rows, columns, device
        self.above: list[BlockBorder | None] = [None] * columns
        self.left: BlockBorder | None = None
        self.leaving: deque[tuple[list[Tensor], torch.Event]] = deque()
        self.chunk = torch.empty(0, dtype=torch.uint8)
        self.on_host = Device(device).is_host
        if not self.on_host:
            self.accelerator = Device(device).module
            self.main = self.accelerator.current_stream(device)
            self.stream = self.accelerator.Stream(device)

    def edges(self, row: int, column: int) -> "BlockEdges":
        """Return the edges (see `interface.MovingEdges`) of the block in that row and column, which is the next one."""
        above, left = self.above[column], self.left
        self.above[column] = BlockBorder() if row < self.rows - 1 else None
        self.left = BlockBorder() if column < self.columns - 1 else None
        return BlockEdges(self, (above, left), (self.above[column], self.left))

    def take(self, border: BlockBorder) -> Tensor:
        """Return the oldest piece of a border, on the device, ready for whatever is computed next."""
        if self.on_host:
            return border.kept.popleft()
        if not border.prefetched:
            self.carry([], [border])
        piece, arrived = border.prefetched.popleft()
        self.main.wait_event(arrived)
        return piece

    def carry(self, pieces: list[tuple[BlockBorder, Tensor]], wanted: list[BlockBorder]) -> None:
        """Keep copies of `pieces`, each for its border, and prefetch from the borders that are wanted."""
        if self.on_host:
            for border, piece in pieces:
                border.kept.append(piece.clone())
            return
        out = [(piece.clone(memory_format=torch.contiguous_format), self.allocate(piece)) for _, piece in pieces]
        back = [
            (torch.empty_like(place, device=self.device), place, border)
            for border in wanted
            for place in [border.kept.popleft() for _ in range(min(AHEAD - len(border.prefetched), len(border.kept)))]
        ]
        # The main stream makes what goes out, and may still be using the memory that what comes back is given.
        self.stream.wait_stream(self.main)
        with self.accelerator.stream(self.stream):
            for piece, place in out:
                place.copy_(piece, non_blocking=True)
            for piece, place, _ in back:
                piece.copy_(place, non_blocking=True)
            done = self.stream.record_event()
        for (border, _), (_, place) in zip(pieces, out, strict=True):
            border.kept.append(place)
        for piece, _, border in back:
            border.prefetched.append((piece, done))
        # Waiting for old copies lets their memory be used again in the stream's order, however far launches run ahead.
        self.leaving.append(([piece for piece, _ in out], done))
        if len(self.leaving) > AHEAD:
            self.main.wait_event(self.leaving.popleft()[1])

    def close(self) -> None:
        """Make whatever is computed next wait for the copies in flight, because it may be given their memory."""
        if not self.on_host:
            self.main.wait_stream(self.stream)

    def allocate(self, piece: Tensor) -> Tensor:
        """Return host memory for a piece. Torch keeps pinned memory for later decodes."""
        needed = -(-piece.nbytes // 256) * 256
        if self.chunk.numel() < needed:
            self.chunk = host_memory(max(CHUNK, needed), torch.uint8)
        place, self.chunk = self.chunk[: piece.nbytes], self.chunk[needed:]
        return place.view(piece.dtype).view(piece.shape)


class BlockEdges:
    """One block's `interface.MovingEdges`. Nothing is waited for.

    earlier: the borders with the blocks above and to the left. later: those with the blocks below and to the right.
    None where there is no such block.
    """

    in_flight = 1

    def __init__(
        self, borders: BlockBorders, earlier: tuple[BlockBorder | None, ...], later: tuple[BlockBorder | None, ...]
    ) -> None:
        self.borders, self.earlier, self.later = borders, earlier, later

    def start(self, window: Tensor) -> "BlockEdges":
        """Fill in what earlier blocks kept of `window`, [n, H + 2, W + 2, C], and keep what later ones need of it."""
        self.move(window, 2)
        return self

    def move(self, frames: Tensor, by: int) -> None:
        """Fill in the first `by` rows and columns of `frames` from earlier blocks; keep the last ones for later blocks.

        A kept row begins with columns of the block before, and a kept column with rows of the block above. That is how
        corners travel.
        """
        for border, place in zip(self.earlier, (frames[:, :by], frames[:, :, :by]), strict=True):
            if border is not None:
                place.copy_(self.borders.take(border))
        ends = zip(self.later, (frames[:, -by:], frames[:, :, -by:]), strict=True)
        self.borders.carry(
            [(border, end) for border, end in ends if border is not None],
            [border for border in self.earlier if border is not None],
        )

    def finish(self) -> None:
        """Everything was there at once."""
