"""Rows and columns that one block of a picture stores for the blocks decoded after it.

The line between a block and the next one, below it or to its right, moves by one pixel with each convolution (see
`regions.blocks`). The next block needs the last two rows or columns of every input of the block to continue from there.
Nothing is computed twice, but those rows and columns must be stored, for all frames, until the next block is decoded.
They are stored in host memory. Copies to and from the host run on a separate stream while the device computes.

All blocks run the same steps, so a block reads the pieces in the order in which the previous block stored them.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ranks.devices import Device, host_memory

CHUNK = 64 * 2**20
"""Size in bytes of one allocation of host memory."""

AHEAD = 4
"""Prefetch depth: pieces copied to the device before they are needed, and copies to the host that may be in flight."""


@dataclass
class BlockBorder:
    """The pieces that one block stores for another, in the order in which the other reads them."""

    kept: deque[Tensor] = field(default_factory=deque)
    """Pieces in host memory."""
    prefetched: deque[tuple[Tensor, torch.Event]] = field(default_factory=deque)
    """Pieces on the device. Each is valid after its event."""


class BlockBorders:
    """The borders of a grid of blocks, decoded row by row, and the copies to and from host memory."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.rows, self.columns, self.device = rows, columns, device
        self.above: list[BlockBorder | None] = [None] * columns
        self.left: BlockBorder | None = None
        self.outgoing: deque[tuple[list[Tensor], torch.Event]] = deque()
        self.chunk = torch.empty(0, dtype=torch.uint8)
        self.on_host = Device(device).is_host
        if not self.on_host:
            self.accelerator = Device(device).module
            self.main = self.accelerator.current_stream(device)
            self.stream = self.accelerator.Stream(device)

    def edges(self, row: int, column: int) -> "BlockEdges":
        """Return the edges (see `interface.MovingEdges`) of the next block to decode, at this row and column."""
        above, left = self.above[column], self.left
        self.above[column] = BlockBorder() if row < self.rows - 1 else None
        self.left = BlockBorder() if column < self.columns - 1 else None
        return BlockEdges(self, (above, left), (self.above[column], self.left))

    def take(self, border: BlockBorder) -> Tensor:
        """Return the oldest piece of a border, on the device, valid for work launched after this call."""
        if self.on_host:
            return border.kept.popleft()
        if not border.prefetched:
            self.carry([], [border])
        piece, arrived = border.prefetched.popleft()
        self.main.wait_event(arrived)
        return piece

    def carry(self, pieces: list[tuple[BlockBorder, Tensor]], wanted: list[BlockBorder]) -> None:
        """Store copies of `pieces` in their borders, and prefetch from the borders in `wanted`."""
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
        # The main stream computes the pieces, and may still use the memory that the prefetched ones are allocated in.
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
        # Once the main stream has waited for a copy, the allocator may reuse its memory in stream order, even if kernel
        # launches run far ahead.
        self.outgoing.append(([piece for piece, _ in out], done))
        if len(self.outgoing) > AHEAD:
            self.main.wait_event(self.outgoing.popleft()[1])

    def close(self) -> None:
        """Make the main stream wait for the copies in flight, because later allocations may reuse their memory."""
        if not self.on_host:
            self.main.wait_stream(self.stream)

    def allocate(self, piece: Tensor) -> Tensor:
        """Return host memory for a piece. PyTorch caches pinned memory for later decodes."""
        needed = -(-piece.nbytes // 256) * 256
        if self.chunk.numel() < needed:
            self.chunk = host_memory(max(CHUNK, needed), torch.uint8)
        place, self.chunk = self.chunk[: piece.nbytes], self.chunk[needed:]
        return place.view(piece.dtype).view(piece.shape)


class BlockEdges:
    """The `interface.MovingEdges` of one block. It never blocks the host.

    earlier: borders with the blocks above and to the left. later: borders with the blocks below and to the right. An
    entry is None if there is no such block.
    """

    in_flight = 1

    def __init__(
        self, borders: BlockBorders, earlier: tuple[BlockBorder | None, ...], later: tuple[BlockBorder | None, ...]
    ) -> None:
        self.borders, self.earlier, self.later = borders, earlier, later

    def start(self, window: Tensor) -> "BlockEdges":
        """Fill the border of `window`, [n, H + 2, W + 2, C], from earlier blocks; store its last rows and columns."""
        self.move(window, 2)
        return self

    def move(self, frames: Tensor, by: int) -> None:
        """Fill the first `by` rows and columns of `frames` from earlier blocks; store the last ones for later blocks.

        A stored row begins with columns of the block to the left, and a stored column with rows of the block above, so
        corners are passed on too.
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
        """Do nothing: `start` has already filled the border."""
