"""One rank's part of a denoising step.

Weights that do not fit on the device stay in host memory (`placement`). First these are the weights of the modulation,
a third of all: they depend on the timestep alone, so they pass through the device once for each timestep, and the
results are kept for the next prompt with the same schedule. Then these are blocks, which are streamed.

Patches are merged into weights as these are loaded. When a step has other patches, only the weights that these or the
last ones change are read again.
"""

import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import Cancelled, NotLoaded, OutOfMemory
from ..ranks.collective import Watch, agree, group_of, reserve
from ..ranks.devices import Device
from ..ranks.shared_memory import shared_file
from .conditions import Condition, Context
from .job import NOUN, PARTS, DenoiseRequest
from .loading import build, fetch_patched, put
from .merge import Patch
from .parallel import Layout, plan
from .patches import read_patches
from .placement import KEPT_STEPS, WORKSPACE, Placement, Sizes, sizes_of
from .share import Share, window_elements
from .transformer import Modulation, Transformer
from .upload import Transfer, Uploads
from .weights import Stored, TransformerCheckpoint, open_transformer, part_of, sources, stored_tensors
from .window import Window, Windows

KEPT = 4
"""Conditions that are kept: those of two prompts."""
KEPT_PATCHES = 2
"""Sets of patches that are kept: those of two models that a graph samples in turn."""
CHECKS = 13
"""How often in a forward ranks agree on a cancel: every fourth of 54 blocks. It takes two ranks 0.3 ms (gloo, on two
busy cores), and a block at 480x848x33 as little as 1 ms with eight GPUs."""
AHEAD = 4
"""Tensors that are on their way to the device while patches are merged into another one."""
UNLIMITED = 2**62


class DenoiseTask:
    """The transformer of one checkpoint on one device, and the conditions that were sent for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.transformer: Transformer | None = None
        self.loaded: tuple[str, str] | None = None
        """Identity and dtype of the checkpoint that the transformer has."""
        self.checkpoint: TransformerCheckpoint | None = None
        self.uploads: Uploads | None = None
        """Copies the weights, if there is a transformer."""
        self.conditions: dict[str, dict[str, Tensor]] = {}
        """Tensors of conditions by their keys, on the host; the one that was used last comes last."""
        self.patches: dict[str, tuple[torch.dtype, dict[str, list[Patch]]]] = {}
        """Merge dtype and patches, mapped from shared memory, by the key of the set; the one used last comes last."""
        self.merged: dict[str, str | None] = {}
        """For each changed weight, by its key in the checkpoint, the set that is merged; None: unknown."""
        self.placement: Placement | None = None
        """The weights that are on the device, if the transformer is loaded."""
        self.asked: tuple | None = None
        """What the placement was chosen for: shape and memory limit."""
        self.short = False
        """Whether the device's memory ran out since the last release. Then no more weights move to it."""
        self.held = 0
        """Bytes of the weights on the device."""
        self.modulations: dict[tuple[float, ...], Modulation] = {}
        """By timestep, the second time if there is one, and whether they are averaged."""
        self.contexts: dict[str, list[Context]] = {}
        """By key of the conditions: for each video, what the transformer's embedders make of them."""
        self.windows = Windows(device)

    def load(self, fields: Mapping, tensors: Mapping[str, Tensor], watch: Watch) -> None:
        """Keep the conditions or patches that the fields name, or load the weights for a run.

        Raises NotLoaded, Cancelled.
        """
        if "key" in fields:
            self.conditions.pop(fields["key"], None)  # it comes last also if it was here
            self.conditions[fields["key"]] = {name: tensor.clone() for name, tensor in tensors.items()}
            for oldest in list(self.conditions)[:-KEPT]:
                del self.conditions[oldest]
                self.contexts.pop(oldest, None)
            return
        if "patches" in fields:
            with shared_file(fields["place"]) as path:
                self.patches[fields["patches"]] = read_patches(path, tensors["numbers"])
            for oldest in list(self.patches)[:-KEPT_PATCHES]:
                del self.patches[oldest]
            return
        request = DenoiseRequest.from_json(fields["request"])
        if any(key not in self.conditions for key in request.conditions):
            raise NotLoaded("the conditions of the step are not loaded.")
        if request.patches is not None and request.patches not in self.patches:
            raise NotLoaded("the patches of the step are not loaded.")
        for key in request.conditions:
            self.conditions[key] = self.conditions.pop(key)
        if request.patches is not None:
            self.patches[request.patches] = self.patches.pop(request.patches)
        wanted = fields["identity"], request.dtype or fields["dtype"]
        if self.loaded != wanted:
            self._unload()
        self._open(fields)
        placement = self._choose(request)
        if self.loaded != wanted or self.placement != placement:
            self._unload()
            self.placement = placement
            self._load(fields, request.patches, watch)
            self.loaded = wanted
        elif outdated := self._outdated(request.patches):
            self._change(fields, request.patches, outdated, watch)

    @torch.inference_mode()
    def run(self, fields: Mapping, tensors: Mapping[str, Tensor], watch: Watch) -> None:
        """Predict this rank's rows of each branch that it has a share of, from the tensor "latents" into "rows"."""
        request = DenoiseRequest.from_json(fields["request"])
        layout = self._layout(request)
        groups = {ranks: group_of(ranks) for ranks in layout.groups}
        try:
            window = self._window(layout, request, groups)
            self._reserve(request)
            modulations = self._modulations_of(request)
            times = torch.tensor(request.timesteps, device=self.device)
            own = layout.of(self.rank)
            pace = _Pace(watch, len(own) * request.shape[0], self.world_size)
            for branch in own:
                split, key = layout.branches[branch], request.conditions[branch]
                share = Share(split, split.ranks.index(self.rank), groups[split.ranks], window)
                contexts, fixed = self._contexts_of(key), self.conditions[key].get("latents")
                for video, latent in enumerate(tensors["latents"]):
                    latent = torch.cat([self._moved(latent), *([] if fixed is None else [self._moved(fixed[video])])])
                    rows = self.transformer.forward(
                        latent, times[video : video + 1], contexts[video], modulations[video], share, pace.block_done
                    )
                    tensors["rows"][branch, video, share.tokens] = rows.to("cpu", torch.float32)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # what they hold is free for the next try
            Device(self.device).empty_cache()
            self.short = True
            raise self._out_of_memory(self._sizes(request).needed(self.placement), self._free()) from error

    def fits(self, fields: Mapping, free: int) -> bool:
        """Return whether a step fits with all weights, or within its memory limit. Conditions stay on the host."""
        if "request" not in fields:
            return True
        self._open(fields)
        request = DenoiseRequest.from_json(fields["request"])
        sizes = self._sizes(request)
        needed = sizes.needed(sizes.fastest)
        return min(needed, request.memory or needed) <= free + self.held + self.windows.nbytes

    def release(self) -> None:
        """Give the device memory back, and the memory that the controller shares. Conditions stay on the host."""
        self._unload()
        self.windows.close()
        self.patches.clear()
        self.short = False

    def _unload(self) -> None:
        self.transformer = self.loaded = self.uploads = None
        self.held = 0
        self.merged.clear()
        self.contexts.clear()
        self.modulations.clear()
        Device(self.device).empty_cache()

    def _open(self, fields: Mapping) -> None:
        """Open the checkpoint that the fields of a run name, and note their dtype."""
        if self.checkpoint is None or self.checkpoint.identity != fields["identity"]:
            with shared_file(fields["checkpoint"]) as path:
                self.checkpoint = replace(open_transformer(path), identity=fields["identity"])
        self.dtype = getattr(torch, fields["request"].get("dtype") or fields["dtype"])

    def _load(self, fields: Mapping, patches: str | None, watch: Watch) -> None:
        """Bring the weights to the device; on the CPU, and in the file's dtype, they stay mapped from the files."""
        self.uploads = Uploads(self.device, self.dtype)
        weights: dict[str, Tensor | Stored] = {}
        try:
            self.transformer = self._built(fields, patches, weights, watch)
        except torch.OutOfMemoryError as error:
            held = sum(part.nbytes for part in weights.values() if isinstance(part, Tensor))
            weights.clear()
            traceback.clear_frames(error.__traceback__)
            raise self._no_room(held) from error
        self.held = self._sizes().weights(self.placement)
        _, changed = self._changes(patches)
        self.merged = dict.fromkeys(changed, patches)

    def _built(
        self, fields: Mapping, patches: str | None, weights: dict[str, Tensor | Stored], watch: Watch
    ) -> Transformer:
        """Read all weights into the dictionary and return the transformer, which is built while they are copied."""
        with self.uploads.transfer(partial(_check, watch)) as transfer:
            for name, part in self._read(fields, patches, None, watch, transfer):
                weights[name] = part
            return build(self.checkpoint.architecture, weights, self.uploads)

    def _outdated(self, patches: str | None) -> set[str]:
        """Return the keys of the weights that have to be read again for a set of patches."""
        _, changed = self._changes(patches)
        others = {key for key, merged in self.merged.items() if merged != patches or key not in changed}
        return others | (changed.keys() - self.merged.keys())

    def _changes(self, patches: str | None) -> tuple[torch.dtype | None, dict[str, list[Patch]]]:
        """Return the merge dtype and the patches of a set, by their keys."""
        return self.patches[patches] if patches is not None else (None, {})

    def _change(self, fields: Mapping, patches: str | None, keys: set[str], watch: Watch) -> None:
        """Read these weights again, merge the patches and replace the old ones, with all that was computed of them."""
        self.contexts.clear()
        self.modulations.clear()
        self.merged |= dict.fromkeys(keys)  # some have changed if this ends early
        try:
            with self.uploads.transfer(partial(_check, watch)) as transfer:
                for name, part in self._read(fields, patches, keys, watch, transfer):
                    put(self.transformer, name, part)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
            raise self._no_room(self.held) from error
        _, changed = self._changes(patches)
        self.merged = {key: patches for key in self.merged if key in changed}

    def _read(
        self, fields: Mapping, patches: str | None, keys: set[str] | None, watch: Watch, transfer: Transfer
    ) -> Iterator[tuple[str, Tensor | Stored]]:
        """Yield the weights of these keys, or all, patched, by their names in diffusers' layout.

        They are on the device when the transfer ends, or `Stored` if they stay on the host. Raises Cancelled.
        """
        names = sources(self.checkpoint)
        for key, stored in self._patched(fields, patches, keys, watch, transfer):
            for name in names[key]:
                part = Stored(part_of(stored.tensor, name, self.checkpoint.layout), stored.scale)
                yield name, transfer.add(part) if self.placement.keeps(name) else part.to_host()

    def _patched(
        self, fields: Mapping, patches: str | None, keys: set[str] | None, watch: Watch, transfer: Transfer
    ) -> Iterator[tuple[str, Stored]]:
        """Yield the tensors of these keys, or all: those with patches merged on the device, the others mapped."""
        merge_dtype, changed = self._changes(patches)
        coming: deque[tuple[str, Callable[[], Stored]]] = deque()
        with shared_file(fields["checkpoint"]) as path:
            for key, stored in stored_tensors(self.checkpoint.at(path), keys):
                _check(watch)
                if key not in changed:
                    yield key, stored
                    continue
                coming.append((key, fetch_patched(stored, changed[key], merge_dtype, transfer)))
                if len(coming) > AHEAD:
                    key, patched = coming.popleft()
                    yield key, patched()
            for key, patched in coming:
                yield key, patched()

    def _layout(self, request: DenoiseRequest) -> Layout:
        sizes = self.checkpoint.architecture
        return plan(self.world_size, len(request.conditions), request.tokens, sizes.heads, sizes.head_dim)

    def _window(self, layout: Layout, request: DenoiseRequest, groups: Mapping) -> Window | None:
        """Return the window through which this rank exchanges, if there is one. A collective of the world."""
        own = [(layout.branches[branch], request.conditions[branch]) for branch in layout.of(self.rank)]
        elements = max(
            window_elements(split, context.tokens, self.checkpoint.architecture.head_dim)
            for split, key in own
            for context in self._contexts_of(key)
        )
        ranks = own[0][0].ranks  # those of all branches of this rank
        return self.windows.of_group(ranks, groups[ranks], elements, self.dtype)

    def _modulations_of(self, request: DenoiseRequest) -> list[Modulation]:
        """The modulation of each video's timestep."""
        second = [request.timesteps_r] if request.timesteps_r else []
        keys = [(*times, request.averaged_times) for times in zip(request.timesteps, *second, strict=True)]
        if missing := [key for key in dict.fromkeys(keys) if key not in self.modulations]:
            *times, _ = zip(*missing, strict=True)
            rows = (torch.tensor(row, device=self.device) for row in times)
            made = self.transformer.modulation(*rows, averaged=request.averaged_times)
            self.modulations |= zip(missing, made, strict=True)
        found = [self.modulations[key] for key in keys]
        for oldest in list(self.modulations)[:-KEPT_STEPS]:
            del self.modulations[oldest]
        return found

    def _contexts_of(self, key: str) -> list[Context]:
        if key not in self.contexts:
            tensors = self.conditions[key]
            videos = sum(name.startswith("text.") for name in tensors)
            parts = [[tensors.get(f"{part}.{i}") for part in PARTS] for i in range(videos)]
            moved = ([part if part is None else self._moved(part) for part in of_video] for of_video in parts)
            self.contexts[key] = [self.transformer.encode(Condition(*of_video)) for of_video in moved]
        return self.contexts[key]

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def _choose(self, request: DenoiseRequest) -> Placement:
        """Return the placement of the weights for a step.

        It stays as it is while the step fits and is like the one before. If it followed the free memory, steps would
        load weights again and again.
        """
        sizes = self._sizes(request)
        # On the CPU weights stay mapped, and the system reads them again when it needs their memory for something else.
        free = UNLIMITED if Device(self.device).is_host else self._free()
        limit = min(free, request.memory or free)
        asked, before = (request.shape, request.memory), self.asked
        self.asked = asked
        fits = self.transformer is not None and sizes.needed(self.placement) <= limit
        return self.placement if fits and (asked == before or self.short) else sizes.choose(limit)

    def _free(self) -> int:
        """Bytes that a step may use on this device, those that this task holds already included."""
        return Device(self.device).free_bytes(self.world_size) + self.held + self.windows.nbytes

    def _sizes(self, request: DenoiseRequest | None = None) -> Sizes:
        """Bytes that a step takes on the busiest rank. No request: those of the weights alone."""
        return sizes_of(self.checkpoint.architecture, self.dtype, None if request is None else self._layout(request))

    def _reserve(self, request: DenoiseRequest) -> None:
        """Take what the step will need from the device, so that memory runs out here, on all ranks, or not at all."""
        needed = self._sizes(request).needed(self.placement)
        if request.memory is not None and needed > request.memory:
            raise self._out_of_memory(needed, request.memory, on_all_ranks=True)
        if not reserve(Device(self.device), needed - self.windows.nbytes):
            self.short = True
            raise self._out_of_memory(needed, self._free(), on_all_ranks=True)

    def _no_room(self, held: int) -> OutOfMemory:
        """Return the error for weights that do not fit. held: bytes that they had taken."""
        Device(self.device).empty_cache()
        self.short = True
        needed = self._sizes().weights(self.placement) + WORKSPACE
        return self._out_of_memory(needed, max(self._free(), held))

    def _out_of_memory(self, needed: int, free: int, on_all_ranks: bool = False) -> OutOfMemory:
        held, smallest = Device(self.device).held_by_others(), self.placement.resident == 0
        return OutOfMemory(
            needed, free, self.device, held, noun=NOUN, smallest_plan=smallest, on_all_ranks=on_all_ranks
        )


def _check(watch: Watch) -> None:
    """Count as progress, and raise Cancelled after a cancel."""
    if watch.cancelled():
        raise Cancelled


class _Pace:
    """Counts the blocks of this rank's forwards in a step, and ends them on all ranks at once after a cancel."""

    def __init__(self, watch: Watch, forwards: int, world_size: int) -> None:
        self.watch, self.forwards = watch, forwards
        self.world_size = world_size
        self.done = 0

    def block_done(self, _: int, blocks: int) -> None:
        self.done += 1
        self.watch.progress(self.done, self.forwards * blocks)
        every = max(1, blocks // CHECKS) if self.world_size > 1 else 1
        if self.done % every == 0 and agree(self.watch.cancelled()):
            raise Cancelled
