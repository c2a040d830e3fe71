"""What ranks send each other while they decode one picture.

Every rank holds one region of the picture. Before a convolution it fetches a border of one pixel, the halo, from its
neighbours. For the attention all ranks gather keys and values. If ranks continue in blocks, they gather the trunk's
output too. Nothing else travels, and no rank ever holds the whole video.

All ranks of the division make the same calls here in the same order, because all of them run the same `Steps` on the
same job. Whether to continue is agreed on between chunks (see `seamless`).
"""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from .regions import Division

IN_FLIGHT = 2
"""Steps in progress at once while borders travel: one computes while the other's borders are on their way."""


class Exchange:
    """The borders of one window on their way. Rows travel first, then columns with the corners that the rows
    brought."""

    def __init__(self, halo: "Halo", window: Tensor) -> None:
        self.halo, self.window = halo, window
        self.dims = [dim for dim in (1, 2) if halo.neighbours[dim]]
        self.begin()

    def begin(self) -> None:
        """Start the next dimension, if there is one left."""
        self.works, self.arrived = [], []
        if not self.dims:
            return
        dim = self.dims.pop(0)
        operations = []
        for peer, inner, border in self.halo.neighbours[dim]:
            leaving = self.window.select(dim, inner).contiguous()
            arriving = torch.empty_like(leaving)
            operations.append(dist.P2POp(dist.isend, leaving, peer))
            operations.append(dist.P2POp(dist.irecv, arriving, peer))
            self.arrived.append((self.window.select(dim, border), arriving))
        self.works = dist.batch_isend_irecv(operations)

    def finish(self) -> None:
        """Wait, on the device's stream if it has one, and copy what has arrived into the window's border."""
        while self.works:
            for work in self.works:
                work.wait()
            for border, arriving in self.arrived:
                border.copy_(arriving)
            self.begin()
        if self in self.halo.pending:
            self.halo.pending.remove(self)


class Halo:
    """One rank's place in a division of the picture. The first `division.size` ranks of the world take part."""

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
        """Begin to fetch the border of `window`, [n, H + 2, W + 2, C], from the neighbours."""
        exchange = Exchange(self, window)
        self.pending.append(exchange)
        return exchange

    def drain(self) -> None:
        """Finish the pending exchanges, after a decode that ended early at the same step on every rank."""
        while self.pending:
            self.pending[0].finish()

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, [n, positions, C] each, of the whole picture.

        They are in the picture's order, whatever the division, so that attention adds up in the same order for any
        number of ranks.
        """
        n, _, channels = keys.shape
        whole = keys.new_empty(2 * n, self.division.row_cuts[-1], self.division.column_cuts[-1], channels)
        self.assemble(torch.cat([keys, values]), whole)
        return whole[:n].flatten(1, 2), whole[n:].flatten(1, 2)

    def assemble(self, own: Tensor, picture: Tensor) -> None:
        """Put every rank's `own`, [n, positions, C], into its region of `picture`, [n, H, W, C], on every rank."""
        for region, positions in zip(self.division.regions, self._all(own), strict=True):
            place = picture[:, region.top : region.bottom, region.left : region.right]
            place.copy_(positions.unflatten(1, (region.height, region.width)))

    def _all(self, own: Tensor) -> list[Tensor]:
        """Every rank's [n, positions, C].

        Regions differ by a row or a column, and not every backend gathers tensors of different sizes (gloo refuses).
        So each is padded to the size of the largest.
        """
        padded = own.new_zeros(own.shape[0], max(self.sizes), own.shape[2])
        padded[:, : own.shape[1]] = own
        gathered = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(gathered, padded, group=self.group)
        return [tensor[:, :size] for tensor, size in zip(gathered, self.sizes, strict=True)]
