"""Room on the devices that ranks share with ComfyUI, both ways.

Before a decode ComfyUI's models make room. Afterwards ComfyUI must be able to get the ranks' memory back, on whichever
device it wants it: memory is only taken from models that it has loaded on that device. So a stand-in is loaded on each
of a group's devices, and on ComfyUI's main device, from which /free and the unload button work in older versions.
Unloading one releases the ranks.
"""

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.cli_args import args

from ..distributed import RankGroup

EVERYTHING = 1e29
"""Bytes. ComfyUI asks for 1e30 where all models are to go, and for no more than a device has where room is wanted."""


class _StandIn(torch.nn.Module):
    """A model of no parameters, as whose memory the ranks' counts."""


class RanksPatcher(comfy.model_patcher.ModelPatcher):
    """Stands for a rank group among ComfyUI's loaded models of one device. When it is detached, the group releases."""

    def __init__(self, group: RankGroup, device: torch.device) -> None:
        super().__init__(_StandIn(), device, torch.device("cpu"))
        self.group = group
        self.loaded_ahead = False
        """Whether ranks were asked to load weights on this device before a decode."""
        self.held = False
        """Whether the ranks may have anything to release."""

    def loaded_size(self) -> float:
        """ComfyUI asks for a part of a model, and takes what `partially_unload` says, if it wants less than this."""
        decoded = self.group.decoded and str(self.load_device) in self.group.devices
        return super().loaded_size() if decoded or self.loaded_ahead else EVERYTHING

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, **_: object) -> float:
        return memory_to_free  # the ranks have nothing where room is wanted

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        if unpatch_all and self.held:  # else it is only being loaded anew, or another device's stand-in was here first
            self.group.release()
            for patcher in _patchers.get(self.group.id, {}).values():
                patcher.held = patcher.loaded_ahead = False
        return super().detach(unpatch_all)


_patchers: dict[str, dict[str, RanksPatcher]] = {}
"""By group, then by device."""


def _stand_ins(group: RankGroup) -> list[RanksPatcher]:
    main = comfy.model_management.get_torch_device()
    own = _patchers.setdefault(group.id, {})
    for device in dict.fromkeys([main, *map(torch.device, group.devices)]):
        if str(device) not in own:
            own[str(device)] = RanksPatcher(group, device)
        own[str(device)].held = True
    return list(own.values())


def _load(patcher: RanksPatcher) -> None:
    """Add a stand-in to ComfyUI's loaded models. ComfyUI's own function would unload others first."""
    entry, entries = comfy.model_management.LoadedModel(patcher), comfy.model_management.current_loaded_models
    if entry not in entries:
        entry.model_load()
        entries.append(entry)


def forget(group: RankGroup) -> None:
    """Take a group that has ended out of ComfyUI's loaded models."""
    loaded = comfy.model_management.current_loaded_models
    for patcher in _patchers.pop(group.id, {}).values():
        for entry in [entry for entry in loaded if entry.model is patcher]:
            loaded.remove(entry)


def enter(group: RankGroup) -> None:
    """Enter ranks that are about to load ahead among ComfyUI's models, so that /free reaches them. Nothing moves."""
    sampling = sampling_devices(group)
    for patcher in _stand_ins(group):
        device = str(patcher.load_device)
        patcher.loaded_ahead = device != "cpu" and device in group.devices and device not in sampling
        _load(patcher)


def sampling_devices(group: RankGroup) -> list[str]:
    """Those of a group's accelerators that ComfyUI samples on, where ranks must not load ahead.

    These are its main device, and every device on which it has a model of its own.
    """
    loaded = comfy.model_management.current_loaded_models
    used = {str(entry.device) for entry in loaded if not isinstance(entry.model, RanksPatcher)}
    used.add(str(comfy.model_management.get_torch_device()))
    return [device for device in group.devices if device != "cpu" and device in used]


def make_room(group: RankGroup) -> None:
    """Have ComfyUI's models leave the devices that the group's ranks are on, and enter the ranks."""
    patchers = _stand_ins(group)
    keep = [comfy.model_management.LoadedModel(patcher) for patcher in patchers]
    for name in sorted({name for name in group.devices if name != "cpu"}):
        # All of it: a decode takes what it is given and is the faster for it.
        comfy.model_management.free_memory(1e30, torch.device(name), keep)
    comfy.model_management.soft_empty_cache()
    for patcher in patchers:
        _load(patcher)


def memory_limit(group: RankGroup, chosen: int | None) -> int | None:
    """Bytes that each rank may use: what was chosen, and no more than --reserve-vram leaves of the smallest device.

    None for all free memory.
    """
    devices = [torch.device(name) for name in group.devices if name != "cpu"]
    if args.reserve_vram is None or not devices:
        return chosen
    smallest = min(comfy.model_management.get_total_memory(device) for device in devices)
    left = int(smallest - comfy.model_management.extra_reserved_memory())
    if left <= 0:
        raise ValueError(
            f"--reserve-vram {args.reserve_vram:g} leaves no memory on a device of {smallest / 2**30:.1f} GiB."
        )
    return left if chosen is None else min(chosen, left)
