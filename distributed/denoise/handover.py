"""Transfer of a transformer that exists only in memory: copied once to shared memory, which all ranks map."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quoting import quote
from ..safetensors_files import ALL_DTYPES
from ..shared_weights import LazyTensor, SharedFile
from .layout import SCALE, original_names
from .weights import TransformerCheckpoint, architecture_of_core, core_shapes, open_transformer

NAME = "The transformer"


@dataclass(frozen=True, eq=False)
class SharedTransformer:
    """A transformer in shared memory, which is freed together with this object."""

    checkpoint: TransformerCheckpoint
    file: SharedFile


def share_transformer(tensors: Mapping[str, Tensor | LazyTensor], mark: str) -> SharedTransformer:
    """Copy a transformer's tensors, one by one, to a file in shared memory.

    tensors: by core's keys. Only those that the transformer reads are read; 8-bit weights and their scales are copied
    as they are. mark: identity of the weights: ranks that have loaded weights of the same mark do not load again.
    Raises CheckpointError if it is not a HunyuanVideo-1.5 transformer, and what `SharedFile` raises.
    """
    architecture = architecture_of_core({key: tuple(tensor.shape) for key, tensor in tensors.items()}, NAME)
    wanted = core_shapes(architecture)
    read = {
        new: tensors[key]
        for new, key in original_names(tensors, NAME).items()
        if new in wanted or (new.endswith(SCALE) and new.removesuffix(SCALE) in wanted)
    }
    for key, tensor in read.items():
        if tensor.dtype not in ALL_DTYPES.values():
            raise CheckpointError(f"{NAME} has {quote(key)} as {tensor.dtype}, which ranks cannot use.")
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise CheckpointError(f"{NAME} was not loaded: its {quote(key)} holds no numbers (meta device).")
    file = SharedFile(read, "hv15-transformer")
    return SharedTransformer(replace(open_transformer(file.path), identity=mark), file)
