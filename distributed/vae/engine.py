"""One rank's decoding: from a job, a latent and the shared frames to its own pixels in them.

`Engine.decode` is a collective: every rank of the world calls it with the same job and latent. Nobody gathers the
video; ranks write disjoint pixels. Between chunks all ranks agree whether to go on (one small all-reduce on the CPU),
so that a cancel, or a rank that lacks memory, ends the decode on all of them at the same place and leaves them ready
for the next.
"""

import contextlib
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import astuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import Cancelled, OutOfMemory
from ..ranks.collective import Watch, agree, first_ranks
from ..ranks.devices import Device
from .halo import Mesh
from .hunyuanvideo15.decoder import Tail, Trunk, Weights, split
from .job import NOUN, DecodeRequest, check_request, frame_count
from .output import PixelWriter
from .plan import WORKSPACE, Plan, choose_plan
from .regions import Region, blocks, divide, hull, whole
from .seams import Seams
from .tiling import SPATIAL, Tile, TileGrid, assign, blend, seam, tile_grid


class _OneOf:
    """What a watch is told of one video of a batch."""

    def __init__(self, watch: Watch, index: int, count: int) -> None:
        self.watch, self.index, self.count = watch, index, count
        self.cancelled = watch.cancelled

    def progress(self, done: int, total: int) -> None:
        self.watch.progress(self.index * total + done, self.count * total)


class Engine:
    """The decoder of one checkpoint on one rank's device.

    `tensors` are the decoder's, in diffusers' names without "decoder.". Where torch.distributed is initialised its
    default group is the world; otherwise this rank is alone. Raises OutOfMemory where the weights do not fit.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.weights = self._load_weights(tensors)
        self.writer = PixelWriter(device)
        # Between 0 and 1 bfloat16 is eight times as coarse as float16.
        self.tile_dtype = torch.float16 if dtype == torch.bfloat16 else dtype
        self.needed = 0
        """Bytes that the decode in hand was planned to need."""

    def _load_weights(self, tensors: Mapping[str, Tensor]) -> Weights:
        with contextlib.suppress(torch.OutOfMemoryError):
            return Weights(tensors, self.device, self.dtype)
        self._empty_cache()
        meta = torch.device("meta")
        needed = Weights({name: tensor.to(meta) for name, tensor in tensors.items()}, meta, self.dtype).nbytes
        raise self._out_of_memory(
            needed + WORKSPACE, Device(self.device).free_bytes(), smallest_plan=True, on_all_ranks=True
        )

    def release(self) -> None:
        """Give back what the engine holds on the device. It cannot be used again."""
        self.writer.close()
        del self.weights, self.writer
        self._empty_cache()

    def _empty_cache(self) -> None:
        Device(self.device).empty_cache()

    @torch.inference_mode()
    def decode(self, request: DecodeRequest, latent: Tensor, frames: Tensor, watch: Watch) -> None:
        """Decode this rank's part of `latent`, float32 [B, C, T, H, W], into `frames`, float32 [B, T', H', W', 3].

        Raises Cancelled, on all ranks together, OutOfMemory, ValueError for a job that cannot be done.
        """
        check_request(request, self.world_size)
        decode = self._tiled if request.mode == "tiled" else self._seamless
        try:
            for index, (video, place) in enumerate(zip(latent, frames, strict=True)):
                decode(request, video.permute(1, 2, 3, 0), place, _OneOf(watch, index, len(latent)))
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # what they hold is free for the next try
            self._empty_cache()
            raise self._out_of_memory(self.needed, self._free()) from error
        finally:
            self.writer.flush()

    def _check_cancel(self, watch: Watch) -> None:
        if agree(watch.cancelled()):
            raise Cancelled

    def _plan(
        self,
        request: DecodeRequest,
        part: tuple[int, int],
        picture: tuple[int, int],
        *,
        divided: bool = False,
        undivided: bool = False,
        held: int = 0,
    ) -> Plan:
        """The plan of least work that fits every rank (see `choose_plan`), beside `held` bytes of other things."""
        free = request.memory or self._free()
        free = agree(free, dist.ReduceOp.MIN)
        plan, needed = choose_plan(
            self.weights, part, picture, request.latent_shape[2], divided, free - held, undivided=undivided
        )
        if plan is None:
            raise self._out_of_memory(needed + held, free, smallest_plan=True, on_all_ranks=True)
        self._reserve(needed + held)
        return plan

    def _free(self) -> int:
        """Bytes that a decode may use on this device, the weights that are there already included."""
        return Device(self.device).free_bytes(self.world_size) + self.weights.nbytes

    def _reserve(self, needed: int) -> None:
        """Take what the decode will need from the device, so that memory runs out here, on all ranks, or not at all.

        It is given to torch's allocator at once, which keeps it for what comes.
        """
        self.needed = needed
        lacking = False
        try:
            Device(self.device).reserve(needed)
        except torch.OutOfMemoryError:
            lacking = True
        if agree(lacking):
            raise self._out_of_memory(needed, self._free(), on_all_ranks=True)

    def _out_of_memory(
        self, needed: int, free: int, smallest_plan: bool = False, on_all_ranks: bool = False
    ) -> OutOfMemory:
        held = Device(self.device).held_by_others()
        return OutOfMemory(
            needed, free, self.device, held, noun=NOUN, smallest_plan=smallest_plan, on_all_ranks=on_all_ranks
        )

    def _seamless(self, request: DecodeRequest, video: Tensor, frames: Tensor, watch: Watch) -> None:
        height, width = video.shape[1:3]
        division = divide(height, width, self.world_size)
        largest = division.largest
        divided = division.size > 1
        plan = self._plan(request, (largest.height, largest.width), (height, width), divided=divided)
        group = first_ranks(division.size)
        if self.rank >= division.size:  # too many ranks for so small a picture: these only keep in step
            for _ in range(1 if plan.blocks == (1, 1) else 1 + plan.blocks[0] * plan.blocks[1]):
                for _ in self._chunks(video, plan, watch):
                    pass
            return
        mesh = Mesh(division, self.rank, group) if divided else None
        region = division.region(self.rank)
        done, total = 0, region.height * region.width * SPATIAL**2 * len(frames)
        passes = self._passes(plan, region, mesh, video, watch)
        try:
            for shown, finished in passes:
                place = frames[:, shown.top : shown.bottom, shown.left : shown.right]
                at = 0
                for pixels in finished:
                    start, at = at, at + len(pixels)
                    done += shown.height * shown.width * len(pixels)
                    self._write(pixels, place[start:at], lambda done=done: watch.progress(done, total))
        except Cancelled:
            if mesh:
                mesh.drain()
            raise
        finally:
            passes.close()

    def _passes(
        self, plan: Plan, region: Region, mesh: Mesh | None, video: Tensor, watch: Watch
    ) -> Generator[tuple[Region, Iterator[Tensor]], None, None]:
        """What the blocks of a rank's region show, in pixels of the picture, and their pixels to come.

        A block's tail is gone when the last of its pixels has been taken, before the next one's is made.
        """
        w = self.weights
        part = self._load(video[:, region.top : region.bottom, region.left : region.right])
        trunk = Trunk(w, region.height, region.width, len(part), mesh)
        inputs = trunk.run(self._chunks(part, plan, watch))
        if plan.blocks == (1, 1):
            shown = Region(*(SPATIAL * side for side in astuple(region)))
            yield shown, Tail(w, whole(region.height, region.width, w.convs), plan.steps, mesh).run(inputs)
            return
        time, height, width, _ = video.shape
        picture = part.new_empty(time, height, width, w.widths[0])
        for place, chunk in zip(split(picture, plan.steps.trunk), inputs, strict=True):
            if mesh:
                mesh.assemble(chunk.flatten(1, 2), place)
            else:
                place.copy_(chunk)
        del trunk  # and its windows
        seams = Seams(*plan.blocks, self.device)
        try:
            for row, column, extents in blocks(region, *plan.blocks, height, width, w.convs):
                seen = hull(extents[0])
                chunks = self._chunks(picture[:, seen.top : seen.bottom, seen.left : seen.right], plan, watch)
                yield extents[-1][-1], Tail(w, extents, plan.steps, seams.edges(row, column)).run(chunks)
        finally:
            seams.close()

    def _chunks(self, video: Tensor, plan: Plan, watch: Watch) -> Iterator[Tensor]:
        """A video in the trunk's steps. Between them all ranks meet to hear of a cancel."""
        for chunk in split(video, plan.steps.trunk):
            self._check_cancel(watch)
            yield chunk

    def _tiled(self, request: DecodeRequest, video: Tensor, frames: Tensor, watch: Watch) -> None:
        time, height, width, _ = video.shape
        grid = tile_grid(height, width, request.tile_size, request.overlap)
        owner = assign(grid, self.world_size)
        side = request.tile_size // SPATIAL
        part = min(side, height), min(side, width)
        costs = [0] * self.world_size
        for tile, rank in zip(grid.tiles, owner, strict=True):
            costs[rank] += tile.cost
        pixel = 3 * self.tile_dtype.itemsize
        held = max(costs) * SPATIAL**2 * frame_count(time) * pixel  # until their neighbours have come
        plan = self._plan(request, part, part, undivided=True, held=held)
        mine = [tile for tile, rank in zip(grid.tiles, owner, strict=True) if rank == self.rank]
        total = costs[self.rank] * frame_count(time)
        decoded: dict[Tile, Tensor] = {}
        done = 0
        try:
            for tile in mine:
                part = video[:, tile.top : tile.bottom, tile.left : tile.right]
                trunk = Trunk(self.weights, *part.shape[1:3], time)
                tail = Tail(self.weights, whole(*part.shape[1:3], self.weights.convs), plan.steps)
                pixels = part.new_empty(
                    frame_count(time),
                    *(SPATIAL * n for n in part.shape[1:3]),
                    3,
                    device=self.device,
                    dtype=self.tile_dtype,
                )
                at = 0
                for piece in tail.run(trunk.run(map(self._load, split(part, plan.steps.trunk)))):
                    if watch.cancelled():
                        raise Cancelled
                    pixels[at : at + len(piece)] = piece
                    at += len(piece)
                    done += tile.cost * len(piece)
                    watch.progress(done, total)
                decoded[tile] = pixels
        except Cancelled:
            pass  # the others hear of it at the next line, where all ranks meet
        self._check_cancel(watch)
        self._blend(grid, owner, decoded, frames)

    def _blend(self, grid: TileGrid, owner: tuple[int, ...], decoded: dict[Tile, Tensor], frames: Tensor) -> None:
        """Blend each tile with its upper and left neighbours and write what survives of it.

        All ranks walk through all tiles in reading order, and edges leave a tile right after it is blended, so sends
        and receives are posted in one order everywhere, which no backend can deadlock on.
        """
        edges: dict[tuple[int, int], tuple[Tensor, dist.Work | None]] = {}
        leaving: list[tuple[Tensor, dist.Work]] = []
        for index, tile in enumerate(grid.tiles):
            pixels = decoded.pop(tile, None)
            if pixels is not None:
                for dim in (1, 2):
                    edge, arrival = edges.pop((index, dim), (None, None))
                    if arrival:
                        arrival.wait()
                    if edge is not None:
                        blend(edge, pixels, dim)
            for other, dim in _followers(grid, index):
                extent = _edge_extent(grid, index, other, dim)
                source, target = owner[index], owner[other]
                if extent == 0 or self.rank not in (source, target):
                    continue
                if pixels is not None:
                    edge = pixels.narrow(dim, pixels.shape[dim] - extent, extent).contiguous()
                else:
                    edge = self._empty_edge(tile, dim, extent, len(frames))
                if source == target:
                    edges[other, dim] = edge, None
                elif source == self.rank:
                    leaving.append((edge, _post(dist.isend, edge, target)))
                else:
                    edges[other, dim] = edge, _post(dist.irecv, edge, source)
            if pixels is not None:
                top, left = tile.top * SPATIAL, tile.left * SPATIAL
                place = frames[:, top : top + tile.height, left : left + tile.width]
                self._write(pixels[:, : tile.height, : tile.width].float(), place, lambda: None)
        for _, departure in leaving:
            departure.wait()

    def _empty_edge(self, tile: Tile, dim: int, extent: int, frames: int) -> Tensor:
        shape = [frames, (tile.bottom - tile.top) * SPATIAL, (tile.right - tile.left) * SPATIAL, 3]
        shape[dim] = extent
        return torch.empty(shape, dtype=self.tile_dtype, device=self.device)

    def _load(self, part: Tensor) -> Tensor:
        return part.to(device=self.device, dtype=self.dtype).contiguous()

    def _write(self, pixels: Tensor, place: Tensor, written: Callable[[], None]) -> None:
        self.writer.write(pixels.clamp_(0, 1), place, written)


def _followers(grid: TileGrid, index: int) -> list[tuple[int, int]]:
    """The tiles that are blended with this one, each with the dimension across the seam: below 1, right 2."""
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
    return seam(sizes[0] * SPATIAL, sizes[1] * SPATIAL, grid.overlap)


def _post(operation, tensor: Tensor, peer: int) -> dist.Work:
    return dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer)])[0]
