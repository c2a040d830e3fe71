"""Room on the devices that ranks share with ComfyUI, both ways.

Before a decode ComfyUI's models make room. Afterwards ComfyUI must be able to get the ranks' memory back: /free, the
unload button and memory pressure only reach models it has loaded on its main device, so a stand-in is loaded there
whose unloading releases the ranks.
"""

import comfy.model_management
import comfy.model_patcher
import torch

from ..distributed import RankGroup


class _StandIn(torch.nn.Module):
    """A model of no parameters, as whose memory the ranks' counts."""


class RanksPatcher(comfy.model_patcher.ModelPatcher):
    """Stands for a rank group among ComfyUI's loaded models: detached, it has the group release its memory."""

    def __init__(self, group: RankGroup) -> None:
        super().__init__(
            _StandIn(), comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
        )
        self.group = group

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        if unpatch_all:  # else it is only being loaded anew
            self.group.release()
        return super().detach(unpatch_all)


_patchers: dict[str, RanksPatcher] = {}


def make_room(group: RankGroup) -> None:
    """Have ComfyUI's models leave the devices that the group's ranks are on, and enter the ranks among them."""
    patcher = _patchers.setdefault(group.id, RanksPatcher(group))
    for name in group.devices:
        device = torch.device(name)
        if device.type != "cpu":
            # All of it: a decode takes what it is given and is the faster for it.
            comfy.model_management.free_memory(1e30, device, [comfy.model_management.LoadedModel(patcher)])
    comfy.model_management.soft_empty_cache()
    comfy.model_management.load_models_gpu([patcher])
