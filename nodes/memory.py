"""Memory on the devices that ranks share with ComfyUI.

ComfyUI's models are unloaded from the ranks' devices if a job does not run at full speed beside them. ComfyUI must be
able to reclaim the ranks' memory on each of these devices, but it only unloads models that are registered as loaded on
a device. So a proxy model is registered for each device of a group, and for ComfyUI's main device, where /free and the
unload button work in older versions. Unloading a proxy releases the ranks' memory.
"""

import math

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.cli_args import args

from ..distributed import RankGroup

LIMIT_MOST = 4096
"""Upper limit of the memory inputs in GiB."""
EVERYTHING = 1e29
"""Size in bytes. ComfyUI requests 1e30 bytes to unload all models, and at most a device's size to make room."""


class _Proxy(torch.nn.Module):
    """A model without parameters that represents the ranks' memory."""


class RanksPatcher(comfy.model_patcher.ModelPatcher):
    """Proxy for a rank group among ComfyUI's loaded models on one device. Detaching it releases the group's memory."""

    def __init__(self, group: RankGroup, device: torch.device) -> None:
        super().__init__(_Proxy(), device, torch.device("cpu"))
        self.group = group
        self.loaded_ahead = False
        """Whether ranks may have loaded weights onto this device ahead of a job."""
        self.may_hold_memory = False
        """Whether the ranks may hold memory that they have not released."""

    def loaded_size(self) -> float:
        """Return the size in bytes. If ComfyUI needs less, it calls `partially_unload` and believes its result."""
        decoded = self.group.decoded and str(self.load_device) in self.group.devices
        return super().loaded_size() if decoded or self.loaded_ahead else EVERYTHING

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, **_: object) -> float:
        return memory_to_free  # the ranks hold no memory on this device

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        if unpatch_all and self.may_hold_memory:  # false during a reload, and after another device's proxy has released
            self.group.release()
            for patcher in _patchers.get(self.group.id, {}).values():
                patcher.may_hold_memory = patcher.loaded_ahead = False
        return super().detach(unpatch_all)


_patchers: dict[str, dict[str, RanksPatcher]] = {}
"""The keys are the group's id and the device."""


def _proxies(group: RankGroup) -> list[RanksPatcher]:
    main = comfy.model_management.get_torch_device()
    own = _patchers.setdefault(group.id, {})
    for device in dict.fromkeys([main, *map(torch.device, group.devices)]):
        if str(device) not in own:
            own[str(device)] = RanksPatcher(group, device)
        own[str(device)].may_hold_memory = True
    return list(own.values())


def _load(patcher: RanksPatcher) -> None:
    """Add a proxy to ComfyUI's loaded models. ComfyUI's own function would unload other models first."""
    entry, entries = comfy.model_management.LoadedModel(patcher), comfy.model_management.current_loaded_models
    if entry not in entries:
        entry.model_load()
        entries.append(entry)


def forget(group: RankGroup) -> None:
    """Remove a group that has ended from ComfyUI's loaded models."""
    loaded = comfy.model_management.current_loaded_models
    for patcher in _patchers.pop(group.id, {}).values():
        for entry in [entry for entry in loaded if entry.model is patcher]:
            loaded.remove(entry)


def register(group: RankGroup) -> None:
    """Register ranks that are about to load ahead, so that /free reaches them. No model is moved."""
    sampling = sampling_devices(group)
    for patcher in _proxies(group):
        device = str(patcher.load_device)
        patcher.loaded_ahead = device != "cpu" and device in group.devices and device not in sampling
        _load(patcher)


def sampling_devices(group: RankGroup) -> list[str]:
    """Return the group's accelerators that ComfyUI samples on. Ranks must not load ahead there.

    These are ComfyUI's main device and every device on which it has loaded a model.
    """
    loaded = comfy.model_management.current_loaded_models
    used = {str(entry.device) for entry in loaded if not isinstance(entry.model, RanksPatcher)}
    used.add(str(comfy.model_management.get_torch_device()))
    return [device for device in group.devices if device != "cpu" and device in used]


def occupy(group: RankGroup) -> None:
    """Register ranks that are about to run a job, and free what torch caches in this process on their devices."""
    for patcher in _proxies(group):
        _load(patcher)
    comfy.model_management.soft_empty_cache()


def make_room(group: RankGroup) -> None:
    """Unload ComfyUI's models from the group's devices."""
    keep = [comfy.model_management.LoadedModel(patcher) for patcher in _proxies(group)]
    for name in sorted({name for name in group.devices if name != "cpu"}):
        comfy.model_management.free_memory(1e30, torch.device(name), keep)
    comfy.model_management.soft_empty_cache()


def limit_in_bytes(memory: object) -> int | None:
    """Return the value of a memory input, in GiB, in bytes, or None for 0. Raises ValueError for an invalid one."""
    number = isinstance(memory, (int, float)) and not isinstance(memory, bool)
    if not number or not math.isfinite(memory) or not 0 <= memory <= LIMIT_MOST:
        raise ValueError(f"memory is {memory!r}; it must be a number of GiB from 0 to {LIMIT_MOST}.")
    return int(memory * 2**30) or None


def memory_limit(group: RankGroup, chosen: int | None) -> int | None:
    """Return the memory limit per rank in bytes, or None for all free memory.

    It is `chosen`, but at most what --reserve-vram leaves of the smallest device. Raises ValueError if that is nothing.
    """
    devices = [torch.device(name) for name in group.devices if name != "cpu"]
    if args.reserve_vram is None or not devices:
        return chosen
    smallest = min(comfy.model_management.get_total_memory(device) for device in devices)
    unreserved = int(smallest - comfy.model_management.extra_reserved_memory())
    if unreserved <= 0:
        raise ValueError(
            f"--reserve-vram {args.reserve_vram:g} leaves no memory on a device of {smallest / 2**30:.1f} GiB."
        )
    return unreserved if chosen is None else min(chosen, unreserved)
