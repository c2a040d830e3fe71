"""Changes of weights, such as a LoRA: small tensors that travel to the ranks, which merge them into the weights.

A usual LoRA changes two thirds of the model, so ranks receive the adapter, not the changed weights. They read the
original weights again from the mapped checkpoint when the patches change.
"""

import json
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..contents import digest, on_host
from ..jobs import Load
from ..quoting import quote
from ..ranks.shared_memory import place_of
from ..safetensors_files import open_file
from ..shared_weights import SharedFile
from .layout import original_names
from .merge import merge
from .weights import TransformerCheckpoint, core_shapes

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


@cache
def _fits(kind: str, tensors: tuple[tuple[str, tuple[int, ...]], ...], shape: tuple[int, ...]) -> bool:
    """Return whether tensors of these shapes can be merged: merge some that have no values."""
    empty = {name: torch.empty(of_tensor, device="meta") for name, of_tensor in tensors}
    try:
        merge(torch.empty(shape, device="meta"), [Patch(kind, 0.5, tensors=empty)])
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


@dataclass(frozen=True, eq=False)
class Patches:
    """Patches of a transformer's weights in shared memory. Equal contents have equal keys.

    numbers: all but the tensors, as JSON in bytes. contents: the digest of the tensors. made_of: the tensors that were
    copied to the file, and their versions.
    """

    key: str
    file: SharedFile
    numbers: Tensor
    contents: str
    made_of: Mapping[str, tuple[weakref.ref, int]]

    @classmethod
    def make(
        cls,
        checkpoint: TransformerCheckpoint,
        patches: Mapping[str, Sequence[Patch]],
        merge_dtype: torch.dtype = torch.float32,
        before: "Patches | None" = None,
    ) -> "Patches":
        """Check patches and copy them to shared memory.

        patches: by core's keys of weights ("double_blocks.0.img_attn.qkv.weight"), in the order in which they are
        merged. merge_dtype: the dtype of the weight during the merge. before: patches made earlier: if they are of the
        same tensor objects, as when only a strength changes, nothing is copied. Raises ValueError for what does not
        fit, MemoryError, with the numbers, and OSError.
        """
        if checkpoint.layout != "core":
            raise ValueError("Only checkpoints in the layout of ComfyUI's files take patches.")
        shapes, tensors, described = core_shapes(checkpoint.architecture), {}, {}
        for key, original in original_names(patches, "The set of patches").items():
            if key not in shapes:
                raise ValueError(f"The transformer has no weight {quote(original)}.")
            described[key] = []
            for i, patch in enumerate(patches[original]):
                try:
                    patch.check(shapes[key])
                except ValueError as error:
                    raise ValueError(f"{original}: {error}") from error
                numbers = [float(patch.strength), float(patch.strength_model), patch.alpha and float(patch.alpha)]
                described[key].append([patch.kind, *numbers, list(patch.tensors)])
                tensors |= {f"{key}/{i}/{name}": tensor for name, tensor in patch.tensors.items()}
        text = json.dumps([str(merge_dtype).removeprefix("torch."), described])
        if before is not None and before._is_made_of(tensors):
            file, contents = before.file, before.contents
        else:
            copies = {name: on_host(tensor) for name, tensor in tensors.items()}
            file, contents = SharedFile(copies, "hv15-patches"), digest(copies)
        key, numbers = digest({}, contents + text), torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        made_of = {name: (weakref.ref(tensor), _version(tensor)) for name, tensor in tensors.items()}
        return cls(key, file, numbers, contents, made_of)

    def _is_made_of(self, tensors: Mapping[str, Tensor]) -> bool:
        return self.made_of.keys() == tensors.keys() and all(
            reference() is tensors[name] and _version(tensors[name]) == version
            for name, (reference, version) in self.made_of.items()
        )

    def load(self, kind: str) -> Load:
        """Return the `Load` with which ranks keep these patches. kind: of the job."""
        return Load(kind, {"patches": self.key, "place": place_of(self.file.path)}, {"numbers": self.numbers})


def _version(tensor: Tensor) -> int:
    """Return a number that changes when the tensor does; 0 if it was made in inference mode, which counts none."""
    return 0 if tensor.is_inference() else tensor._version


def read_patches(path: Path, numbers: Tensor) -> tuple[torch.dtype, dict[str, list[Patch]]]:
    """Return the merge dtype and the patches by their keys, with tensors mapped from the file of `Patches`."""
    dtype, described = json.loads(numbers.numpy().tobytes())
    with open_file(path) as file:
        patches = {
            key: [
                Patch(kind, strength, of_model, {name: file.get_tensor(f"{key}/{i}/{name}") for name in names}, alpha)
                for i, (kind, strength, of_model, alpha, names) in enumerate(of_key)
            ]
            for key, of_key in described.items()
        }
    return getattr(torch, dtype), patches
