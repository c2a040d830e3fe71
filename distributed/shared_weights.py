"""Tensors of this process as a safetensors file in shared memory, which all ranks of a host map."""

import json
import mmap
import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .ranks.shared_memory import SharedMemory
from .safetensors_files import ALL_DTYPES


class LazyTensor(NamedTuple):
    """A tensor that is read when it is copied. `read` returns it, on any device, and is called once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SharedFile:
    """Tensors on any device, copied once and one by one to a read-only safetensors file in shared memory.

    The copy is freed together with this object; ranks that have mapped it keep their mapping. `path` is its path in
    this process, and `place_of` returns how ranks open it. name: of the memory, in lists of the system. Raises
    MemoryError, with the numbers, if the copy does not fit into memory, OSError, and ValueError if a tensor that was
    read has another shape or dtype than was announced.
    """

    def __init__(self, tensors: Mapping[str, Tensor | LazyTensor], name: str) -> None:
        memory = _copy(tensors, name)
        weakref.finalize(self, memory.close)
        self.path = memory.path


def _copy(tensors: Mapping[str, Tensor | LazyTensor], name: str) -> SharedMemory:
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))  # keeps all of them aligned
    names = {dtype: name for name, dtype in ALL_DTYPES.items()}
    header, end = {}, 0
    for key, tensor in ordered.items():
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    memory = SharedMemory(name, start + end, ".safetensors")
    try:
        with mmap.mmap(memory.descriptor, memory.size) as mapping:
            mapping[:start] = len(text).to_bytes(8, "little") + text
            for key, tensor in ordered.items():
                _fill(mapping, start + header[key]["data_offsets"][0], key, tensor)
        memory.offer(read_only=True)
    except BaseException:
        memory.close()
        raise
    return memory


def _fill(mapping: mmap.mmap, offset: int, key: str, tensor: Tensor | LazyTensor) -> None:
    found = tensor.read() if isinstance(tensor, LazyTensor) else tensor
    if tuple(found.shape) != tuple(tensor.shape) or found.dtype != tensor.dtype:
        raise ValueError(
            f"{key} has shape {list(found.shape)} and dtype {found.dtype}; {list(tensor.shape)} and {tensor.dtype} "
            "were announced."
        )
    if found.numel():
        place = torch.frombuffer(mapping, dtype=found.dtype, count=found.numel(), offset=offset)
        place.view(found.shape).copy_(found.detach())
