"""The tile grid of a tiled decode: where tiles are, who decodes them, how neighbours are blended.

The grid, the overlap and the blend are those of `AutoencoderKLHunyuanVideo15.tiled_decode` in diffusers, so that a
tiled decode here gives its pixels. The order of blending matters and is kept: a tile is first blended with its upper
neighbour, then with its left one, and both of them have been blended themselves by then. Reading row by row from the
top left, every tile therefore needs only tiles that come before it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SPATIAL = 16
"""Pixels along one side of a latent position."""


@dataclass(frozen=True)
class Tile:
    """One tile: latent rows [top, bottom) and columns [left, right), and its place in the grid.

    `height` and `width` are the pixels of the decoded tile that are kept: its top left corner, up to where the next
    tile begins.
    """

    row: int
    column: int
    top: int
    bottom: int
    left: int
    right: int
    height: int
    width: int

    @property
    def cost(self) -> int:
        """Latent positions, to which the work of decoding is proportional."""
        return (self.bottom - self.top) * (self.right - self.left)


@dataclass(frozen=True)
class TileGrid:
    """All tiles in reading order, and the pixels over which neighbours are blended."""

    tiles: tuple[Tile, ...]
    rows: int
    columns: int
    overlap: int

    def at(self, row: int, column: int) -> int:
        """Index in `tiles` of the tile in that row and column."""
        return row * self.columns + column


def tile_grid(height: int, width: int, tile_size: int, overlap: int) -> TileGrid:
    """Cover a latent of `height` x `width` positions with tiles of `tile_size` pixels that share `overlap` pixels.

    A latent that is no larger than a tile is one tile, as in diffusers. Raises ValueError where the grid does not allow
    the sizes: both must be multiples of 16, and overlap less than a tile.
    """
    check_tile(tile_size, overlap)
    side, stride = tile_size // SPATIAL, (tile_size - overlap) // SPATIAL
    if max(height, width) <= side:
        stride = side
    tops, lefts = range(0, height, stride), range(0, width, stride)
    tiles = tuple(
        Tile(
            row,
            column,
            top,
            min(top + side, height),
            left,
            min(left + side, width),
            min(stride, height - top) * SPATIAL,
            min(stride, width - left) * SPATIAL,
        )
        for row, top in enumerate(tops)
        for column, left in enumerate(lefts)
    )
    return TileGrid(tiles, len(tops), len(lefts), overlap)


def check_tile(tile_size: int, overlap: int) -> None:
    """Refuse a tile size and an overlap, both in pixels, that the latent grid cannot hold."""
    if tile_size < SPATIAL or tile_size % SPATIAL:
        nearest = max(SPATIAL, round(tile_size / SPATIAL) * SPATIAL)
        raise ValueError(f"tile_size is {tile_size} pixels; it must be a multiple of {SPATIAL}. Try {nearest}.")
    if overlap < 0 or overlap % SPATIAL or overlap >= tile_size:
        nearest = min(max(0, round(overlap / SPATIAL) * SPATIAL), tile_size - SPATIAL)
        raise ValueError(
            f"overlap is {overlap} pixels; it must be a multiple of {SPATIAL}, from 0 to less than tile_size "
            f"({tile_size}). Try {nearest}."
        )


def assign(grid: TileGrid, world_size: int) -> tuple[int, ...]:
    """Give each tile a rank: largest first, always to the rank with the least work (LPT; Graham, 1969).

    Ties go to the earlier tile and the lower rank, so every rank computes the same answer. With more ranks than
    tiles, some ranks get none.
    """
    load = [0] * world_size
    owner = [0] * len(grid.tiles)
    for index in sorted(range(len(grid.tiles)), key=lambda i: -grid.tiles[i].cost):
        rank = min(range(world_size), key=load.__getitem__)
        owner[index] = rank
        load[rank] += grid.tiles[index].cost
    return tuple(owner)


def blend_width(before: int, after: int, overlap: int) -> int:
    """Return how many pixels of two neighbouring tiles of these extents are blended: never more than either has."""
    return min(before, after, overlap)


def blend(edge: Tensor, tile: Tensor, dim: int) -> None:
    """Blend, in place, the beginning of `tile` along `dim` with `edge`, the end of the neighbour before it.

    The weight of the tile grows linearly from 0, as in diffusers' blend_v and blend_h. `edge` is as long along `dim`
    as the blend; nothing happens for an edge of length 0.
    """
    extent = edge.shape[dim]
    if extent == 0:
        return
    shape = [1] * tile.ndim
    shape[dim] = extent
    weight = (torch.arange(extent, dtype=torch.float32, device=tile.device) / extent).view(shape)
    start = tile.narrow(dim, 0, extent)
    start.copy_(edge * (1 - weight) + start * weight)
