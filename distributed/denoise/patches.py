"""Sets of patches: small tensors that travel to the ranks, which merge them into the weights.

A usual LoRA changes two thirds of the model, so ranks receive the adapter, not the changed weights. They read the
original weights again from the mapped checkpoint when the patches change.
"""

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from .merge import Patch
from .weights import TransformerCheckpoint, core_shapes


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
