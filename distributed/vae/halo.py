"""What ranks tell each other while they decode one picture together.

Every rank holds one region of the picture. Before a convolution it fetches a border of one from its neighbours; for
the attention all ranks gather keys and values; where ranks go on in blocks, what the trunk gave. Nothing else travels,
and no rank ever holds the whole video.

At each call here every rank of the division must arrive, in the same order; that they do follows from all of them
running the same `Steps` on the same job. Whether to go on is agreed on in `engine`, between chunks.
"""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from .hunyuanvideo15.decoder import LANES
from .regions import Division


class Exchange:
    """Borders under way for one window. Rows travel first, then columns with the corners that the rows brought."""

    def __init__(self, mesh: "Mesh", window: Tensor) -> None:
        self.mesh, self.window = mesh, window
        self.dims = [dim for dim in (1, 2) if mesh.neighbours[dim]]
        self.begin()

    def begin(self) -> None:
        """Start the next dimension, if there is one left."""
        self.works, self.arrived = [], []
        if not self.dims:
            return
        dim = self.dims.pop(0)
        operations = []
        for peer, inner, border in self.mesh.neighbours[dim]:
            leaving = self.window.select(dim, inner).contiguous()
            arriving = torch.empty_like(leaving)
            operations.append(dist.P2POp(dist.isend, leaving, peer))
            operations.append(dist.P2POp(dist.irecv, arriving, peer))
            self.arrived.append((self.window.select(dim, border), arriving))
        self.works = dist.batch_isend_irecv(operations)

    def finish(self) -> None:
        """Wait, on the device's stream where there is one, and put what came into the window's border."""
        while self.works:
            for work in self.works:
                work.wait()
            for border, arriving in self.arrived:
                border.copy_(arriving)
            self.begin()
        if self in self.mesh.under_way:
            self.mesh.under_way.remove(self)


class Mesh:
    """One rank's place in a division of the picture. The first `division.size` ranks of the world take part."""

    lanes = LANES

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
        self.under_way: deque[Exchange] = deque()

    @property
    def positions(self) -> int:
        """Latent positions of the whole picture."""
        return sum(self.sizes)

    def start(self, window: Tensor) -> Exchange:
        """Begin to fetch the border of `window`, [n, H + 2, W + 2, C], from the neighbours."""
        exchange = Exchange(self, window)
        self.under_way.append(exchange)
        return exchange

    def drain(self) -> None:
        """Finish what is under way, after a decode that ended early at the same step on every rank."""
        while self.under_way:
            self.under_way[0].finish()

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [n, positions, C] each, of the whole picture.

        In the picture's order, whatever the division, so that attention adds up in one order for any number of ranks.
        """
        n, _, channels = keys.shape
        whole = keys.new_empty(2 * n, self.division.row_cuts[-1], self.division.column_cuts[-1], channels)
        self.assemble(torch.cat([keys, values]), whole)
        return whole[:n].flatten(1, 2), whole[n:].flatten(1, 2)

    def assemble(self, part: Tensor, picture: Tensor) -> None:
        """Put every rank's `part`, [n, positions, C], into its place of `picture`, [n, H, W, C], on every rank."""
        for region, positions in zip(self.division.regions, self._all(part), strict=True):
            place = picture[:, region.top : region.bottom, region.left : region.right]
            place.copy_(positions.unflatten(1, (region.height, region.width)))

    def _all(self, own: Tensor) -> list[Tensor]:
        """Every rank's [n, positions, C].

        Regions differ by a row or a column, and not every backend gathers tensors of different sizes (gloo refuses):
        what travels is padded to the largest.
        """
        padded = own.new_zeros(own.shape[0], max(self.sizes), own.shape[2])
        padded[:, : own.shape[1]] = own
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return [part[:, :size] for part, size in zip(parts, self.sizes, strict=True)]
