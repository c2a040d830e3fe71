"""The seamless decode: the untiled decode itself, divided between ranks.

Pixels are pulled: whoever wants the next ones asks for them, and so sets in motion what they are made of. So read the
call from the bottom: `finished_pixels` pulls from the tail, the tail pulls from the trunk, and the trunk pulls from
`checked_chunks`, which asks all ranks whether to continue.

    latent -> checked_chunks -> Trunk -> Tail -> pixels                                           everything streams
    latent -> checked_chunks -> Trunk -> the whole picture, then for each block
                    its part of that -> checked_chunks -> Tail -> pixels                          in blocks
"""

from collections.abc import Generator, Iterator
from dataclasses import astuple

import torch
from torch import Tensor

from ..errors import Cancelled
from ..ranks.collective import Watch, agree
from .block_borders import BlockBorders
from .halo import Halo
from .hunyuanvideo15.decoder import Tail, Trunk, split
from .hunyuanvideo15.weights import Weights
from .interface import Plan
from .regions import Region, blocks, hull, whole
from .tiling import SPATIAL


def check_cancel(watch: Watch) -> None:
    """Raise Cancelled on all ranks if the watch of one of them asks for it. A collective of the world."""
    if agree(watch.cancelled()):
        raise Cancelled


def checked_chunks(video: Tensor, plan: Plan, watch: Watch) -> Iterator[Tensor]:
    """Yield a video in the trunk's steps. Before each, all ranks of the world agree whether to continue."""
    for chunk in split(video, plan.steps.trunk):
        check_cancel(watch)
        yield chunk


def keep_in_step(video: Tensor, plan: Plan, watch: Watch) -> None:
    """Take part in the agreements of a decode in which this rank has no region."""
    down, across = plan.blocks
    for _ in range(1 + down * across if plan.in_blocks else 1):
        for _ in checked_chunks(video, plan, watch):
            pass


def finished_pixels(
    weights: Weights, plan: Plan, region: Region, halo: Halo | None, video: Tensor, watch: Watch
) -> Generator[tuple[Region, Iterator[Tensor]], None, None]:
    """Decode a rank's region of `video`, [T, H, W, C] of the whole picture.

    Yields, for each block or for the whole region, where its pixels are in the picture, in pixels, and an iterator over
    them, [frames, height, width, 3] a few frames at a time. The iterator must be exhausted before the next block, which
    frees the memory of its tail. halo: given if other ranks have the rest of the picture.
    """
    w = weights
    own = video[:, region.top : region.bottom, region.left : region.right]
    own = own.to(device=w.device, dtype=w.dtype).contiguous()
    trunk = Trunk(w, region.height, region.width, len(own), halo)
    features = trunk.run(checked_chunks(own, plan, watch))
    if not plan.in_blocks:
        shown = Region(*(SPATIAL * side for side in astuple(region)))
        yield shown, Tail(w, whole(region.height, region.width, w.convs), plan.steps, halo).run(features)
        return
    picture = _whole_picture(features, own, video.shape[:3], w.widths[0], plan, halo)
    del trunk, features  # and the memory of their caches
    borders = BlockBorders(*plan.blocks, w.device)
    try:
        for row, column, extents in blocks(region, *plan.blocks, *video.shape[1:3], w.convs):
            read = hull(extents[0])
            chunks = checked_chunks(picture[:, read.top : read.bottom, read.left : read.right], plan, watch)
            yield extents[-1][-1], Tail(w, extents, plan.steps, borders.edges(row, column)).run(chunks)
    finally:
        borders.close()


def _whole_picture(
    features: Iterator[Tensor], like: Tensor, size: torch.Size, channels: int, plan: Plan, halo: Halo | None
) -> Tensor:
    """What the trunks of all ranks give, [T, H, W, C] of the whole picture, on every rank."""
    picture = like.new_empty(*size, channels)
    for place, chunk in zip(split(picture, plan.steps.trunk), features, strict=True):
        if halo:
            halo.assemble(chunk.flatten(1, 2), place)
        else:
            place.copy_(chunk)
    return picture
