"""The tile grid of a tiled decode: the tiles, the rank of each, and the blending of neighbours.

Grid, overlap and blend are those of `AutoencoderKLHunyuanVideo15.tiled_decode` in diffusers, so a tiled decode gives
the same pixels. The order of blending is also the same, because it changes the result: a tile is blended first with its
upper and then with its left neighbour, after both have been blended themselves. In reading order every tile therefore
depends only on earlier tiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SPATIAL = 16
"""Side of a latent position in pixels."""


@dataclass(frozen=True)
class Tile:
    """One tile: latent rows [top, bottom) and columns [left, right), and its row and column in the grid.

    `height` and `width` are the size in pixels of the part of the decoded tile that is kept: its top left corner, up to
    the next tile.
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
        """Latent positions of the tile, to which its decoding time is proportional."""
        return (self.bottom - self.top) * (self.right - self.left)


@dataclass(frozen=True)
class TileGrid:
    """All tiles in reading order, and the overlap of neighbours in pixels."""

    tiles: tuple[Tile, ...]
    rows: int
    columns: int
    overlap: int

    def at(self, row: int, column: int) -> int:
        """Return the index in `tiles` of the tile in this row and column."""
        return row * self.columns + column


def tile_grid(height: int, width: int, tile_size: int, overlap: int) -> TileGrid:
    """Cover a latent of `height` x `width` positions with tiles of `tile_size` pixels that overlap by `overlap` pixels.

    A latent that is no larger than a tile is one tile, as in diffusers. Raises ValueError unless both sizes are
    multiples of 16 and overlap is less than tile_size.
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
    """Raise ValueError for a tile size or an overlap, in pixels, that do not match the latent grid."""
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
    """Return the rank of each tile. The largest remaining tile is assigned to the rank with the least work (LPT
    scheduling; Graham, 1969).

    Ties are resolved in favour of the earlier tile and the lower rank, so every rank computes the same result. If there
    are more ranks than tiles, some ranks get no tile.
    """
    load = [0] * world_size
    owner = [0] * len(grid.tiles)
    for index in sorted(range(len(grid.tiles)), key=lambda i: -grid.tiles[i].cost):
        rank = min(range(world_size), key=load.__getitem__)
        owner[index] = rank
        load[rank] += grid.tiles[index].cost
    return tuple(owner)


def blend_width(before: int, after: int, overlap: int) -> int:
    """Return the width in pixels of the blend of two neighbouring tiles of these extents, at most either extent."""
    return min(before, after, overlap)


def blend(edge: Tensor, tile: Tensor, dim: int) -> None:
    """Blend the beginning of `tile` along `dim`, in place, with `edge`, the end of the previous neighbour.

    The tile's weight increases linearly from 0, as in diffusers' blend_v and blend_h. The size of `edge` along `dim` is
    the width of the blend; with size 0 the tile is unchanged.
    """
    extent = edge.shape[dim]
    if extent == 0:
        return
    shape = [1] * tile.ndim
    shape[dim] = extent
    weight = (torch.arange(extent, dtype=torch.float32, device=tile.device) / extent).view(shape)
    start = tile.narrow(dim, 0, extent)
    start.copy_(edge * (1 - weight) + start * weight)
