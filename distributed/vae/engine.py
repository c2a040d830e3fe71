"""One rank's decode: it reads a request and a latent and writes its own pixels to the shared frames.

`Engine.decode` is a collective: every rank of the world calls it with the same request and latent. It plans, dispatches
to `seamless` or `tiled`, and writes the finished pixels. The video is never gathered: ranks write disjoint pixels.
Between chunks all ranks agree whether to continue (one small all-reduce on the CPU). So a cancel, or a rank that is out
of memory, ends the decode on all ranks after the same chunk, and all of them are ready for the next job.
"""

import contextlib
import traceback
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import Cancelled, OutOfMemory
from ..ranks.collective import Watch, agree, first_ranks, reserve
from ..ranks.devices import Device
from .halo import Halo
from .hunyuanvideo15.footprint import WORKSPACE
from .hunyuanvideo15.weights import Weights
from .interface import Plan
from .job import NOUN, DecodeRequest, check_request
from .output import PixelWriter
from .plan import choose_plan
from .regions import divide
from .seamless import check_cancel, finished_pixels, keep_in_step
from .tiled import blend_tiles, decode_tile
from .tiling import SPATIAL, Tile, assign, tile_grid


class _VideoWatch:
    """Convert the progress of one video of a batch to progress of the batch."""

    def __init__(self, watch: Watch, index: int, count: int) -> None:
        self.watch, self.index, self.count = watch, index, count
        self.cancelled = watch.cancelled

    def progress(self, done: int, total: int) -> None:
        self.watch.progress(self.index * total + done, self.count * total)


class Engine:
    """The decoder of one checkpoint on one rank's device.

    `tensors` are the decoder's, with diffusers' names without the prefix "decoder.". If torch.distributed is
    initialised, its default group is the world; otherwise the world is this rank. Raises OutOfMemory if the weights do
    not fit.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.weights = self._load_weights(tensors)
        self.writer = PixelWriter(device)
        # bfloat16 is eight times coarser than float16 between 0 and 1.
        self.tile_dtype = torch.float16 if dtype == torch.bfloat16 else dtype
        self.needed = 0
        """Peak memory in bytes that the current decode is planned to use."""

    def _load_weights(self, tensors: Mapping[str, Tensor]) -> Weights:
        with contextlib.suppress(torch.OutOfMemoryError):
            return Weights(tensors, self.device, self.dtype)
        self._empty_cache()
        needed = Weights.without_memory(tensors, self.device, self.dtype).nbytes
        raise self._out_of_memory(
            needed + WORKSPACE, Device(self.device).free_bytes(), smallest_plan=True, on_all_ranks=True
        )

    def release(self) -> None:
        """Free the engine's device memory. The engine cannot be used afterwards."""
        self.writer.close()
        del self.weights, self.writer
        self._empty_cache()

    def _empty_cache(self) -> None:
        Device(self.device).empty_cache()

    @torch.inference_mode()
    def decode(self, request: DecodeRequest, latent: Tensor, frames: Tensor, watch: Watch) -> None:
        """Decode this rank's share of `latent`, float32 [B, C, T, H, W], into `frames`, float32 [B, T', H', W', 3].

        Raises Cancelled (on all ranks after the same chunk), OutOfMemory, and ValueError for an invalid request.
        """
        check_request(request, self.world_size)
        decode = self._tiled if request.mode == "tiled" else self._seamless
        try:
            for index, (video, place) in enumerate(zip(latent, frames, strict=True)):
                decode(request, video.permute(1, 2, 3, 0), place, _VideoWatch(watch, index, len(latent)))
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # frees the tensors they hold before a retry
            self._empty_cache()
            raise self._out_of_memory(self.needed, self._free()) from error
        finally:
            self.writer.flush()

    def _plan(
        self,
        request: DecodeRequest,
        region: tuple[int, int],
        picture: tuple[int, int],
        *,
        shared: bool = False,
        allow_blocks: bool = True,
        held: int = 0,
    ) -> Plan:
        """Return the cheapest plan that fits on every rank (see `choose_plan`) in addition to `held` bytes."""
        free = request.memory or self._free()
        free = agree(free, dist.ReduceOp.MIN)
        plan, needed = choose_plan(
            self.weights, region, picture, request.latent_shape[2], shared, free - held, allow_blocks=allow_blocks
        )
        if plan is None:
            raise self._out_of_memory(needed + held, free, smallest_plan=True, on_all_ranks=True)
        self._reserve(needed + held)
        return plan

    def _free(self) -> int:
        """Return the bytes that a decode may use on this device, including the weights, which are already loaded."""
        return Device(self.device).free_bytes(self.world_size) + self.weights.nbytes

    def _reserve(self, needed: int) -> None:
        """Reserve the planned memory on the device. If that fails on one rank, all ranks raise OutOfMemory here.

        PyTorch's allocator allocates it once and keeps it cached for the decode.
        """
        self.needed = needed
        if not reserve(Device(self.device), needed):
            raise self._out_of_memory(needed, self._free(), on_all_ranks=True)

    def _out_of_memory(
        self, needed: int, free: int, smallest_plan: bool = False, on_all_ranks: bool = False
    ) -> OutOfMemory:
        held = Device(self.device).held_by_others()
        return OutOfMemory(
            needed, free, self.device, held, noun=NOUN, smallest_plan=smallest_plan, on_all_ranks=on_all_ranks
        )

    def _seamless(self, request: DecodeRequest, video: Tensor, frames: Tensor, watch: Watch) -> None:
        picture = video.shape[1:3]
        division = divide(*picture, self.world_size)
        largest = division.largest
        shared = division.size > 1
        plan = self._plan(request, (largest.height, largest.width), picture, shared=shared)
        group = first_ranks(division.size)
        if self.rank >= division.size:  # the picture cannot be divided between so many ranks
            keep_in_step(video, plan, watch)
            return
        halo = Halo(division, self.rank, group) if shared else None
        region = division.region(self.rank)
        done, total = 0, region.height * region.width * SPATIAL**2 * len(frames)
        finished = finished_pixels(self.weights, plan, region, halo, video, watch)
        try:
            for shown, pieces in finished:
                place = frames[:, shown.top : shown.bottom, shown.left : shown.right]
                at = 0
                for pixels in pieces:
                    start, at = at, at + len(pixels)
                    done += shown.height * shown.width * len(pixels)
                    self._write(pixels, place[start:at], lambda done=done: watch.progress(done, total))
        except Cancelled:
            if halo:
                halo.drain()
            raise
        finally:
            finished.close()

    def _tiled(self, request: DecodeRequest, video: Tensor, frames: Tensor, watch: Watch) -> None:
        picture = video.shape[1:3]
        grid = tile_grid(*picture, request.tile_size, request.overlap)
        owners = assign(grid, self.world_size)
        costs = [0] * self.world_size
        for tile, rank in zip(grid.tiles, owners, strict=True):
            costs[rank] += tile.cost
        like = torch.empty(0, dtype=self.tile_dtype, device=self.device)
        held = max(costs) * SPATIAL**2 * len(frames) * 3 * like.itemsize  # decoded tiles, before blending
        size = tuple(min(request.tile_size // SPATIAL, side) for side in picture)
        plan = self._plan(request, size, size, allow_blocks=False, held=held)
        own = [tile for tile, rank in zip(grid.tiles, owners, strict=True) if rank == self.rank]
        done, total = 0, costs[self.rank] * len(frames)
        decoded: dict[Tile, Tensor] = {}
        try:
            for tile in own:
                latent = video[:, tile.top : tile.bottom, tile.left : tile.right]
                decoded[tile] = like.new_empty(len(frames), *(SPATIAL * side for side in latent.shape[1:3]), 3)
                for count in decode_tile(self.weights, plan, latent, decoded[tile]):
                    if watch.cancelled():
                        raise Cancelled
                    done += tile.cost * count
                    watch.progress(done, total)
        except Cancelled:
            pass  # the next line is a collective; it raises Cancelled on all ranks
        check_cancel(watch)

        def write(tile: Tile, pixels: Tensor) -> None:
            top, left = tile.top * SPATIAL, tile.left * SPATIAL
            self._write(pixels, frames[:, top : top + tile.height, left : left + tile.width], lambda: None)

        blend_tiles(grid, owners, self.rank, decoded, like, len(frames), write)

    def _write(self, pixels: Tensor, place: Tensor, written: Callable[[], None]) -> None:
        self.writer.write(pixels.clamp_(0, 1), place, written)
