"""The seamless decode: the untiled decode, divided between ranks.

It is a chain of generators that its consumer drives: each request for pixels computes the inputs that they need.
`finished_pixels` pulls from the tail, the tail pulls from the trunk, and the trunk pulls from `checked_chunks`, where
all ranks agree whether to continue.

    streaming    latent -> checked_chunks -> Trunk -> Tail -> pixels
    in blocks    latent -> checked_chunks -> Trunk -> features of the whole picture
                 for each block: its features -> checked_chunks -> Tail -> pixels
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
    """Raise Cancelled on all ranks if any rank's watch reports a cancel. A collective of the world."""
    if agree(watch.cancelled()):
        raise Cancelled


def checked_chunks(video: Tensor, plan: Plan, watch: Watch) -> Iterator[Tensor]:
    """Yield a video in chunks of one trunk step. Before each, all ranks of the world agree whether to continue."""
    for chunk in split(video, plan.steps.trunk):
        check_cancel(watch)
        yield chunk


def keep_in_step(video: Tensor, plan: Plan, watch: Watch) -> None:
    """Take part in the collectives of a decode in which this rank has no region."""
    down, across = plan.blocks
    for _ in range(1 + down * across if plan.in_blocks else 1):
        for _ in checked_chunks(video, plan, watch):
            pass


def finished_pixels(
    weights: Weights, plan: Plan, region: Region, halo: Halo | None, video: Tensor, watch: Watch
) -> Generator[tuple[Region, Iterator[Tensor]], None, None]:
    """Decode a rank's region of `video`, [T, H, W, C] of the whole picture.

    Yields, for each block or for the whole region, its region of the picture in pixels and an iterator over its pixels,
    [frames, height, width, 3], a few frames at a time. The iterator must be exhausted before the next block is
    requested; then its tail's memory is freed. halo: given if other ranks decode the rest of the picture.
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
    del trunk, features  # frees their caches
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
    """Gather the trunk's output of all ranks: [T, H, W, C] of the whole picture, on every rank."""
    picture = like.new_empty(*size, channels)
    for place, chunk in zip(split(picture, plan.steps.trunk), features, strict=True):
        if halo:
            halo.assemble(chunk.flatten(1, 2), place)
        else:
            place.copy_(chunk)
    return picture
