"""The tiled decode: diffusers' overlapping tiles, divided between ranks and blended in diffusers' order.

Each rank decodes its tiles one after the other and keeps their pixels. When all ranks have finished, tiles are blended
in reading order, and the kept part of each is written. Ranks exchange only the edges of blended tiles.
"""

from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch import Tensor

from .hunyuanvideo15.decoder import Tail, Trunk, split
from .hunyuanvideo15.weights import Weights
from .interface import Plan
from .regions import whole
from .tiling import SPATIAL, Tile, TileGrid, blend, blend_width


def decode_tile(weights: Weights, plan: Plan, latent: Tensor, pixels: Tensor) -> Iterator[int]:
    """Decode one tile's latent, [T, h, w, C], into `pixels`, [frames, 16h, 16w, 3]. Yields the number of frames
    written by each step."""
    time, height, width, _ = latent.shape
    trunk = Trunk(weights, height, width, time)
    tail = Tail(weights, whole(height, width, weights.convs), plan.steps)
    chunks = (
        chunk.to(device=weights.device, dtype=weights.dtype).contiguous() for chunk in split(latent, plan.steps.trunk)
    )
    at = 0
    for piece in tail.run(trunk.run(chunks)):
        pixels[at : at + len(piece)] = piece
        at += len(piece)
        yield len(piece)


def blend_tiles(
    grid: TileGrid,
    owners: tuple[int, ...],
    rank: int,
    decoded: dict[Tile, Tensor],
    like: Tensor,
    frames: int,
    write: Callable[[Tile, Tensor], None],
) -> None:
    """Blend each tile with its upper and left neighbours, and write the part of it that is kept. A collective.

    owners: the rank of each tile. decoded: this rank's tiles, [frames, height, width, 3] each; they are removed from it
    as they are blended. like: a tensor of their device and dtype. write: called with a tile and its kept pixels,
    float32.

    All ranks iterate over all tiles in reading order, and the edges of a tile are sent right after it is blended. Sends
    and receives are therefore posted in the same order on all ranks, so that no backend can deadlock.
    """
    edges: dict[tuple[int, int], tuple[Tensor, dist.Work | None]] = {}
    outgoing: list[tuple[Tensor, dist.Work]] = []
    for index, tile in enumerate(grid.tiles):
        pixels = decoded.pop(tile, None)
        if pixels is not None:
            for dim in (1, 2):
                edge, work = edges.pop((index, dim), (None, None))
                if work:
                    work.wait()
                if edge is not None:
                    blend(edge, pixels, dim)
        for other, dim in _followers(grid, index):
            extent = _edge_extent(grid, index, other, dim)
            source, target = owners[index], owners[other]
            if extent == 0 or rank not in (source, target):
                continue
            if pixels is not None:
                edge = pixels.narrow(dim, pixels.shape[dim] - extent, extent).contiguous()
            else:
                edge = _empty_edge(tile, dim, extent, frames, like)
            if source == target:
                edges[other, dim] = edge, None
            elif source == rank:
                outgoing.append((edge, _post(dist.isend, edge, target)))
            else:
                edges[other, dim] = edge, _post(dist.irecv, edge, source)
        if pixels is not None:
            write(tile, pixels[:, : tile.height, : tile.width].float())
    for _, work in outgoing:
        work.wait()


def _empty_edge(tile: Tile, dim: int, extent: int, frames: int, like: Tensor) -> Tensor:
    shape = [frames, (tile.bottom - tile.top) * SPATIAL, (tile.right - tile.left) * SPATIAL, 3]
    shape[dim] = extent
    return like.new_empty(shape)


def _followers(grid: TileGrid, index: int) -> list[tuple[int, int]]:
    """Return the later neighbours, each with the dimension it is blended along: 1 for below, 2 for right."""
    tile = grid.tiles[index]
    followers = []
    if tile.row + 1 < grid.rows:
        followers.append((grid.at(tile.row + 1, tile.column), 1))
    if tile.column + 1 < grid.columns:
        followers.append((grid.at(tile.row, tile.column + 1), 2))
    return followers


def _edge_extent(grid: TileGrid, index: int, other: int, dim: int) -> int:
    before, after = grid.tiles[index], grid.tiles[other]
    if dim == 1:
        sizes = before.bottom - before.top, after.bottom - after.top
    else:
        sizes = before.right - before.left, after.right - after.left
    return blend_width(sizes[0] * SPATIAL, sizes[1] * SPATIAL, grid.overlap)


def _post(operation: Callable, tensor: Tensor, peer: int) -> dist.Work:
    return dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer)])[0]
