"""Patches of one weight, such as a LoRA, and their merge into it.

The merge does operation by operation what core does, so that the bits are the same on the same device.

Sources: `calculate_weight` of comfy/lora.py and of comfy/weight_adapter/{lora,loha,lokr}.py, and `weight_decompose` of
comfy/weight_adapter/base.py. They are the same in ComfyUI 0.3.75 and 0.33. Products of adapters are float32 whatever
the weight is, as where core patches loaded weights.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from ..quoting import quote

PRODUCT = torch.float32
DORA = ("dora_scale",)
KINDS: dict[str, tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]] = {
    "lora": ((("up",), ("down",)), ("mid", *DORA)),
    "loha": ((("w1_a",), ("w1_b",), ("w2_a",), ("w2_b",)), ("t1", "t2", *DORA)),
    "lokr": ((("w1", "w1_a"), ("w1", "w1_b"), ("w2", "w2_a"), ("w2", "w2_b")), DORA),
    "diff": ((("diff",),), ()),
    "set": ((("value",),), ()),
}
"""For each kind, the tensors of which one must be present, group by group, and further ones that may be."""


@dataclass(frozen=True, eq=False)
class Patch:
    """One change of one weight W, by core's rules (comfy/lora.py and comfy/weight_adapter).

    W is multiplied by strength_model first. Then the kinds do this, where the names are those of `tensors`:

    - "lora": W + strength * alpha / rank * up @ down. mid: the middle part of a convolution's. dora_scale: DoRA.
    - "loha": the same with (w1_a @ w1_b) * (w2_a @ w2_b). t1, t2: of a convolution's, both or none.
    - "lokr": the same with kron(w1, w2). Each is given whole, or as w1_a @ w1_b.
    - "diff": W + strength * diff.
    - "set": value replaces W, whatever the strength: for kinds that only core can merge.

    alpha: None means the rank.
    """

    kind: str
    strength: float = 1.0
    strength_model: float = 1.0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError if ranks cannot merge this patch into a weight of this shape."""
        if self.kind not in KINDS:
            raise ValueError(f"{quote(self.kind)} is not a kind of patch; there are {', '.join(KINDS)}.")
        groups, further = KINDS[self.kind]
        known = {name for group in groups for name in group} | set(further)
        missing = [" or ".join(group) for group in groups if not self.tensors.keys() & set(group)]
        if missing or (unknown := sorted(self.tensors.keys() - known)):
            words = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(map(quote, unknown))}"
            raise ValueError(f"A patch of kind {self.kind} {words}.")
        if not all(map(math.isfinite, (self.strength, self.strength_model, self.alpha or 0.0))):
            raise ValueError(
                f"The patch's strength, strength_model and alpha are {self.strength}, {self.strength_model} and "
                f"{self.alpha}; they must be finite."
            )
        of_tensors = tuple((name, tuple(tensor.shape)) for name, tensor in self.tensors.items())
        if not _fits(self.kind, of_tensors, tuple(shape)):
            shapes = ", ".join(f"{name} {list(of_tensor)}" for name, of_tensor in of_tensors)
            raise ValueError(f"A patch of kind {self.kind} with {shapes} does not fit {list(shape)}.")


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


@cache
def _fits(kind: str, tensors: tuple[tuple[str, tuple[int, ...]], ...], shape: tuple[int, ...]) -> bool:
    """Return whether tensors of these shapes can be merged: merge some that have no values."""
    empty = {name: torch.empty(of_tensor, device="meta") for name, of_tensor in tensors}
    try:
        merge(torch.empty(shape, device="meta"), [Patch(kind, 0.5, tensors=empty)])
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


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
