"""What blocks of one picture, decoded one after the other, hand on to each other.

A block ends where the next one, below it or to its right, begins, and that line moves by a pixel with each convolution
(`regions.blocks`): whatever a block reads, the next one needs the last two rows or columns of it, to go on from there.
So nothing is computed twice, at the price of keeping those, for all frames, until the next block's turn. They wait in
host memory, to which and from which they travel on a stream of their own, while the device computes.

All blocks take the same steps, so what one keeps in some order is what the next one asks for in that order.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ranks.devices import host_memory

CHUNK = 64 * 2**20
"""Bytes of host memory taken at a time."""

AHEAD = 4
"""Pieces of a seam that are sent for before they are asked for, and moves whose pieces may be on their way out."""


@dataclass
class Seam:
    """What one block keeps for another, in the order in which that one asks for it."""

    kept: deque[Tensor] = field(default_factory=deque)
    """In host memory."""
    coming: deque[tuple[Tensor, torch.Event]] = field(default_factory=deque)
    """On the device once its event has come."""


class Seams:
    """All seams of a grid of blocks, which is gone through row by row, and the way to host memory and back."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.rows, self.columns, self.device = rows, columns, device
        self.above: list[Seam | None] = [None] * columns
        self.left: Seam | None = None
        self.leaving: deque[tuple[list[Tensor], torch.Event]] = deque()
        self.chunk = torch.empty(0, dtype=torch.uint8)
        if device.type != "cpu":
            self.accelerator = torch.get_device_module(device)
            self.main = self.accelerator.current_stream(device)
            self.stream = self.accelerator.Stream(device)

    def edges(self, row: int, column: int) -> "SeamEdges":
        """The edges (see `decoder.MovingEdges`) of the block in that row and column, which is the next one."""
        above, left = self.above[column], self.left
        self.above[column] = Seam() if row < self.rows - 1 else None
        self.left = Seam() if column < self.columns - 1 else None
        return SeamEdges(self, (above, left), (self.above[column], self.left))

    def take(self, seam: Seam) -> Tensor:
        """The oldest piece of a seam, on the device for whatever is computed next."""
        if self.device.type == "cpu":
            return seam.kept.popleft()
        if not seam.coming:
            self.carry([], [seam])
        piece, arrived = seam.coming.popleft()
        self.main.wait_event(arrived)
        return piece

    def carry(self, pieces: list[tuple[Seam, Tensor]], asked: list[Seam]) -> None:
        """Keep copies of `pieces`, each for its seam, and send for more of the seams that are asked."""
        if self.device.type == "cpu":
            for seam, piece in pieces:
                seam.kept.append(piece.clone())
            return
        out = [(piece.clone(memory_format=torch.contiguous_format), self.room(piece)) for _, piece in pieces]
        back = [
            (torch.empty_like(place, device=self.device), place, seam)
            for seam in asked
            for place in [seam.kept.popleft() for _ in range(min(AHEAD - len(seam.coming), len(seam.kept)))]
        ]
        self.stream.wait_stream(self.main)  # which makes what goes out, and had the memory of what comes back
        with self.accelerator.stream(self.stream):
            for piece, place in out:
                place.copy_(piece, non_blocking=True)
            for piece, place, _ in back:
                piece.copy_(place, non_blocking=True)
            done = self.stream.record_event()
        for (seam, _), (_, place) in zip(pieces, out, strict=True):
            seam.kept.append(place)
        for piece, _, seam in back:
            seam.coming.append((piece, done))
        # To wait for them lets their memory be used again in the stream's order, however far launches run ahead.
        self.leaving.append(([piece for piece, _ in out], done))
        if len(self.leaving) > AHEAD:
            self.main.wait_event(self.leaving.popleft()[1])

    def close(self) -> None:
        """Let whatever is computed next wait for what is under way, whose memory it may be given."""
        if self.device.type != "cpu":
            self.main.wait_stream(self.stream)

    def room(self, piece: Tensor) -> Tensor:
        """Host memory for a piece. Torch keeps what is pinned for later decodes."""
        needed = -(-piece.nbytes // 256) * 256
        if self.chunk.numel() < needed:
            self.chunk = host_memory(max(CHUNK, needed), torch.uint8)
        place, self.chunk = self.chunk[: piece.nbytes], self.chunk[needed:]
        return place.view(piece.dtype).view(piece.shape)


class SeamEdges:
    """One block's `decoder.MovingEdges`. Nothing is waited for.

    earlier, later: the seams with the blocks above and to the left, and below and to the right, where there are such.
    """

    lanes = 1

    def __init__(self, seams: Seams, earlier: tuple[Seam | None, ...], later: tuple[Seam | None, ...]) -> None:
        self.seams, self.earlier, self.later = seams, earlier, later

    def start(self, window: Tensor) -> "SeamEdges":
        """Put into `window`, [n, H + 2, W + 2, C], what earlier blocks kept, and keep what later ones need of it."""
        self.move(window, 2)
        return self

    def move(self, frames: Tensor, by: int) -> None:
        """Put into the first `by` rows and columns of `frames` what earlier blocks kept; keep the last for later ones.

        A kept row begins with columns of the block before, and a kept column with rows of the block above: so corners
        travel.
        """
        for seam, place in zip(self.earlier, (frames[:, :by], frames[:, :, :by]), strict=True):
            if seam is not None:
                place.copy_(self.seams.take(seam))
        ends = zip(self.later, (frames[:, -by:], frames[:, :, -by:]), strict=True)
        self.seams.carry(
            [(seam, end) for seam, end in ends if seam is not None], [seam for seam in self.earlier if seam is not None]
        )

    def finish(self) -> None:
        """Everything was there at once."""
