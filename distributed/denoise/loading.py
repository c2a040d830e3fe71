"""From the tensors of a mapped checkpoint to the weights of a module on a device: patched, moved and cut."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import Architecture
from .merge import merge
from .patches import Patch
from .weights import Stored


class OnHost(nn.Module):
    """A linear layer whose weights stay on the host, and pass through the device when it computes."""

    def __init__(self, weight: Stored, bias: Stored) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias  # no parameters: these are not the device's

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.device, x.dtype), self.bias.to(x.device, x.dtype))


def patch(stored: Stored, patches: Sequence[Patch], device: torch.device, merge_dtype: torch.dtype) -> Stored:
    """Merge patches on the device, in the merge dtype, into the values of a tensor.

    As in core, the result is rounded to the dtype that the tensor was stored in. Core rounds to 8 bits at random; here
    the result stays in the merge dtype then, which is closer to the exact one.
    """
    merged = merge(stored.to(device, merge_dtype, copy=True), patches)
    return Stored(merged if stored.in_8_bits else merged.to(stored.tensor.dtype))


def build(architecture: Architecture, weights: Mapping[str, Tensor | Stored]) -> nn.Module:
    """Return diffusers' module with these weights, by its names. A layer whose weights are `Stored` is an `OnHost`."""
    from diffusers import HunyuanVideo15Transformer3DModel  # takes seconds, which ranks that only decode do not need

    with torch.device("meta"):
        model = HunyuanVideo15Transformer3DModel(**architecture.config)
    on_host = {name: part for name, part in weights.items() if isinstance(part, Stored)}
    for layer in {name.rpartition(".")[0] for name in on_host}:
        model.set_submodule(layer, OnHost(on_host[f"{layer}.weight"], on_host[f"{layer}.bias"]))
    model.load_state_dict({name: part for name, part in weights.items() if name not in on_host}, assign=True)
    return model.eval().requires_grad_(False)


def put(model: nn.Module, name: str, part: Tensor | Stored) -> None:
    """Replace one weight of a module from `build`."""
    layer, _, kind = name.rpartition(".")
    value = part if isinstance(part, Stored) else nn.Parameter(part, requires_grad=False)
    setattr(model.get_submodule(layer), kind, value)
