"""Room on the devices that ranks share with ComfyUI, both ways.

Before a decode ComfyUI's models make room. Afterwards ComfyUI must be able to get the ranks' memory back: /free, the
unload button and memory pressure only reach models it has loaded on its main device, so a stand-in is loaded there
whose unloading releases the ranks. Pressure is for ranks that have decoded there; ranks that have loaded ahead keep
what they have, for the decode that is to come, until everything is to be freed.
"""

import comfy.model_management
import comfy.model_patcher
import torch

from ..distributed import RankGroup

EVERYTHING = 1e29
"""Bytes. ComfyUI asks for 1e30 where all models are to go, and for no more than a device has where room is wanted."""


class _StandIn(torch.nn.Module):
    """A model of no parameters, as whose memory the ranks' counts."""


class RanksPatcher(comfy.model_patcher.ModelPatcher):
    """Stands for a rank group among ComfyUI's loaded models: detached, it has the group release its memory."""

    def __init__(self, group: RankGroup) -> None:
        super().__init__(
            _StandIn(), comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
        )
        self.group = group

    def loaded_size(self) -> float:
        """ComfyUI asks for a part of a model, and takes what `partially_unload` says, if it wants less than this."""
        in_the_way = self.group.decoded and str(self.load_device) in self.group.devices
        return super().loaded_size() if in_the_way else EVERYTHING

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, **_: object) -> float:
        return memory_to_free  # the ranks have nothing where room is wanted

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        if unpatch_all:  # else it is only being loaded anew
            self.group.release()
        return super().detach(unpatch_all)


_patchers: dict[str, RanksPatcher] = {}


def _patcher(group: RankGroup) -> RanksPatcher:
    if group.id not in _patchers:
        _patchers[group.id] = RanksPatcher(group)
    return _patchers[group.id]


def enter(group: RankGroup) -> None:
    """Enter ranks that are about to load ahead among ComfyUI's models, so that /free reaches them. Nothing moves."""
    entry, entries = comfy.model_management.LoadedModel(_patcher(group)), comfy.model_management.current_loaded_models
    if entry not in entries:
        entry.model_load()
        entries.append(entry)


def make_room(group: RankGroup) -> None:
    """Have ComfyUI's models, and other groups, leave the devices that the group's ranks are on, and enter the ranks."""
    patcher = _patcher(group)
    devices = {name for name in group.devices if name != "cpu"}
    for other in _patchers.values():
        if other is not patcher and devices.intersection(other.group.devices):
            other.group.release()
    for name in sorted(devices):
        # All of it: a decode takes what it is given and is the faster for it.
        entry = comfy.model_management.LoadedModel(patcher)
        comfy.model_management.free_memory(1e30, torch.device(name), [entry])
    comfy.model_management.soft_empty_cache()
    comfy.model_management.load_models_gpu([patcher])
