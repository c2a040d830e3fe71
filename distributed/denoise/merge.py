"""Merges patches into a weight, operation by operation as core does, so that the bits are the same on the same device.

Sources: `calculate_weight` of comfy/lora.py and of comfy/weight_adapter/{lora,loha,lokr}.py, and `weight_decompose` of
comfy/weight_adapter/base.py. They are the same in ComfyUI 0.3.75 and 0.33. Products of adapters are float32 whatever
the weight is, as where core patches loaded weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .patches import Patch

PRODUCT = torch.float32


def merge(weight: Tensor, patches: Iterable[Patch]) -> Tensor:
    """Merge patches into the weight, in place, and return it."""
    for patch in patches:
        if patch.strength_model != 1.0:
            weight *= patch.strength_model
        if patch.kind in DELTAS:
            tensors = {name: tensor.to(weight.device).to(PRODUCT) for name, tensor in patch.tensors.items()}
            delta, rank = DELTAS[patch.kind](tensors)
            alpha = 1.0 if patch.alpha is None or rank is None else patch.alpha / rank
            delta = delta.reshape(weight.shape)
            if "dora_scale" in patch.tensors:
                _decompose(weight, tensors["dora_scale"], delta, alpha, patch.strength)
            else:
                weight += ((patch.strength * alpha) * delta).type(weight.dtype)
            continue
        (tensor,) = patch.tensors.values()
        if tensor.shape != weight.shape:
            raise ValueError(f"{list(tensor.shape)} is not {list(weight.shape)}")
        if patch.kind == "set":
            weight.copy_(tensor)
        elif patch.strength != 0.0:
            weight += patch.strength * tensor.to(weight.device).to(weight.dtype)
    return weight


def _lora(tensors: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Return the change of the weight, [rows, columns], and the rank."""
    up, down = tensors["up"], tensors["down"]
    rank = down.shape[0]
    if (mid := tensors.get("mid")) is not None:
        shape = [down.shape[1], down.shape[0], mid.shape[2], mid.shape[3]]
        flat = (part.transpose(0, 1).flatten(start_dim=1) for part in (down, mid))
        down = torch.mm(*flat).reshape(shape).transpose(0, 1)
    return torch.mm(up.flatten(start_dim=1), down.flatten(start_dim=1)), rank


def _loha(tensors: dict[str, Tensor]) -> tuple[Tensor, int]:
    one, other = (_product(tensors, f"w{i}_a", f"w{i}_b", f"t{i}") for i in (1, 2))
    return one * other, tensors["w1_b"].shape[0]


def _lokr(tensors: dict[str, Tensor]) -> tuple[Tensor, int | None]:
    one, other = tensors.get("w1"), tensors.get("w2")
    rank = None
    if one is None:
        one, rank = torch.mm(tensors["w1_a"], tensors["w1_b"]), tensors["w1_b"].shape[0]
    if other is None:
        other, rank = torch.mm(tensors["w2_a"], tensors["w2_b"]), tensors["w2_b"].shape[0]
    if other.ndim == 4:
        one = one.unsqueeze(2).unsqueeze(2)
    return torch.kron(one, other), rank


DELTAS = {"lora": _lora, "loha": _loha, "lokr": _lokr}


def _product(tensors: dict[str, Tensor], a: str, b: str, middle: str) -> Tensor:
    if middle in tensors:
        return torch.einsum("i j k l, j r, i p -> p r k l", tensors[middle], tensors[b], tensors[a])
    return torch.mm(tensors[a], tensors[b])


def _decompose(weight: Tensor, scale: Tensor, delta: Tensor, alpha: float, strength: float) -> None:
    """Apply a DoRA to the weight, in place: its direction changes by the delta, its length becomes the scale."""
    delta *= alpha
    changed = weight + delta.type(weight.dtype)
    if scale.shape[0] == changed.shape[0]:
        norm = weight.reshape(len(weight), -1).norm(dim=1, keepdim=True).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        columns = changed.transpose(0, 1)
        norm = columns.reshape(len(columns), -1).norm(dim=1, keepdim=True)
        norm = norm.reshape(-1, *[1] * (weight.ndim - 1)).transpose(0, 1)
    norm = norm + torch.finfo(weight.dtype).eps
    changed *= (scale / norm).type(weight.dtype)
    if strength != 1.0:
        changed -= weight
        weight += strength * changed
    else:
        weight[:] = changed
