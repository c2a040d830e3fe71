"""Communication between ranks during the seamless decode of one picture.

Every rank holds one region of the picture. Before a convolution it receives a border of one pixel, the halo, from its
neighbours. For the attention all ranks gather keys and values. If the tail is decoded in blocks, they also gather the
trunk's output. Nothing else is exchanged, and no rank ever holds the whole video.

All ranks of the division make the same calls in the same order, because they run the same `Steps` on the same job.
Between chunks they agree whether to continue (see `seamless`).
"""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from .regions import Division

IN_FLIGHT = 2
"""Number of steps in progress at once: one computes while the borders of the other are in flight."""


class Exchange:
    """The exchange of one window's borders. Rows are exchanged first, then columns, which include the corners that
    the rows filled."""

    def __init__(self, halo: "Halo", window: Tensor) -> None:
        self.halo, self.window = halo, window
        self.dims = [dim for dim in (1, 2) if halo.neighbours[dim]]
        self.begin()

    def begin(self) -> None:
        """Start the exchange of the next dimension, if any is left."""
        self.works, self.received = [], []
        if not self.dims:
            return
        dim = self.dims.pop(0)
        operations = []
        for peer, inner, border in self.halo.neighbours[dim]:
            outgoing = self.window.select(dim, inner).contiguous()
            incoming = torch.empty_like(outgoing)
            operations.append(dist.P2POp(dist.isend, outgoing, peer))
            operations.append(dist.P2POp(dist.irecv, incoming, peer))
            self.received.append((self.window.select(dim, border), incoming))
        self.works = dist.batch_isend_irecv(operations)

    def finish(self) -> None:
        """Wait, on the device's stream if it has one, and copy the received rows and columns into the border."""
        while self.works:
            for work in self.works:
                work.wait()
            for border, incoming in self.received:
                border.copy_(incoming)
            self.begin()
        if self in self.halo.pending:
            self.halo.pending.remove(self)


class Halo:
    """One rank's place in a division of the picture between the first `division.size` ranks of the world."""

    in_flight = IN_FLIGHT

    def __init__(self, division: Division, rank: int, group: dist.ProcessGroup) -> None:
        self.division, self.group = division, group
        row, column = divmod(rank, division.columns)
        self.neighbours: dict[int, list[tuple[int, int, int]]] = {1: [], 2: []}
        if row > 0:
            self.neighbours[1].append((rank - division.columns, 1, 0))
        if row < division.rows - 1:
            self.neighbours[1].append((rank + division.columns, -2, -1))
        if column > 0:
            self.neighbours[2].append((rank - 1, 1, 0))
        if column < division.columns - 1:
            self.neighbours[2].append((rank + 1, -2, -1))
        self.sizes = [region.height * region.width for region in division.regions]
        self.pending: deque[Exchange] = deque()

    @property
    def positions(self) -> int:
        """Latent positions of the whole picture."""
        return sum(self.sizes)

    def start(self, window: Tensor) -> Exchange:
        """Start receiving the border of `window`, [n, H + 2, W + 2, C], from the neighbours."""
        exchange = Exchange(self, window)
        self.pending.append(exchange)
        return exchange

    def drain(self) -> None:
        """Finish the pending exchanges after a cancel, which ends the decode at the same step on every rank."""
        while self.pending:
            self.pending[0].finish()

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, [n, positions, C] each, of the whole picture.

        They are in the picture's order for any division, so attention sums in the same order for any number of ranks.
        """
        n, _, channels = keys.shape
        whole = keys.new_empty(2 * n, self.division.row_cuts[-1], self.division.column_cuts[-1], channels)
        self.assemble(torch.cat([keys, values]), whole)
        return whole[:n].flatten(1, 2), whole[n:].flatten(1, 2)

    def assemble(self, own: Tensor, picture: Tensor) -> None:
        """Gather every rank's `own`, [n, positions, C], into its region of `picture`, [n, H, W, C], on every rank."""
        for region, positions in zip(self.division.regions, self._all(own), strict=True):
            place = picture[:, region.top : region.bottom, region.left : region.right]
            place.copy_(positions.unflatten(1, (region.height, region.width)))

    def _all(self, own: Tensor) -> list[Tensor]:
        """Return every rank's [n, positions, C].

        Regions can differ by a row or a column, and not every backend can gather tensors of different sizes (Gloo
        cannot), so each is padded to the largest.
        """
        padded = own.new_zeros(own.shape[0], max(self.sizes), own.shape[2])
        padded[:, : own.shape[1]] = own
        gathered = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(gathered, padded, group=self.group)
        return [tensor[:, :size] for tensor, size in zip(gathered, self.sizes, strict=True)]
