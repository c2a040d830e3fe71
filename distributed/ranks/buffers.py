"""Tensors in shared memory: inputs and weights that ranks read, and outputs that they write.

Outputs are returned as tensors without a copy. When a tensor and all views of it are gone, its buffer returns to the
pool, where the next job reuses it with its pages already allocated. If the pool was trimmed meanwhile, the buffer is
freed.
"""

import mmap
import os
import threading
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .memory import available_memory
from .shared_memory import SharedMemory, open_shared

KEPT = 2
"""Number of large buffers that are kept for the next jobs."""
KEPT_SMALL = 16
"""Number of small buffers that are kept for the next jobs."""
SMALL = 2**26
"""Maximum size of a small buffer in bytes."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
}
DIMENSIONS = 8
PLACE_LENGTH = 4096


class _Mapping(mmap.mmap):
    """An mmap that weak references can refer to. A tensor made from it keeps it alive."""


@dataclass(frozen=True)
class SharedTensor:
    """Description of a shared tensor, from which a rank opens it (`open_tensor`). All fields are JSON values."""

    place: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def from_json(cls, value: object) -> "SharedTensor":
        """Return the shared tensor that was encoded as `value`. Raises ValueError for anything else."""
        if not isinstance(value, dict) or value.keys() != {"place", "dtype", "shape"}:
            raise ValueError(f"{str(value)[:80]!r} is not a shared tensor")
        place, dtype, shape = value["place"], value["dtype"], value["shape"]
        if type(dtype) is not str or dtype not in DTYPES:
            raise ValueError(
                f"the dtype of a shared tensor is {str(dtype)[:80]}; it must be one of {', '.join(DTYPES)}"
            )
        if type(place) is not str or len(place) > PLACE_LENGTH:
            raise ValueError(f"{str(place)[:80]!r} is not the place of a shared tensor")
        if type(shape) is not list or len(shape) > DIMENSIONS:
            raise ValueError(f"{str(shape)[:80]} is not the shape of a shared tensor")
        if not all(type(size) is int and 0 <= size < 2**53 for size in shape):
            raise ValueError(f"{str(shape)[:80]} is not the shape of a shared tensor")
        return cls(place, dtype, tuple(shape))


@dataclass
class SharedBuffers:
    """A pool of shared memory for tensors."""

    _free: list[SharedMemory] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _lent: set[SharedMemory] = field(default_factory=set)

    @property
    def lent(self) -> int:
        """Number of buffers in use that will return to the pool."""
        return len(self._lent)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, SharedTensor]:
        """Return a tensor with uninitialised values, and its description for the ranks (see `open_tensor`).

        Raises MemoryError, with the numbers, if less memory is available; and OSError.
        """
        name, size = str(dtype).removeprefix("torch."), torch.Size(shape).numel() * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype), SharedTensor("", name, tuple(shape))
        with self._lock:
            fitting = [buffer for buffer in self._free if size <= buffer.size <= 2 * size]
            buffer = min(fitting, key=lambda b: b.size, default=None)
            if buffer:
                self._free.remove(buffer)
            elif size > available_memory():
                self._free_all()
        buffer = buffer or self._create(size)
        try:
            mapping = _Mapping(buffer.descriptor, buffer.size)
        except (OSError, ValueError):
            buffer.close()
            raise
        with self._lock:
            self._lent.add(buffer)
        weakref.finalize(mapping, self._give_back, buffer)
        return _view(mapping, dtype, shape), SharedTensor(buffer.place, name, tuple(shape))

    def trim(self) -> None:
        """Free unused buffers now, and buffers in use as soon as they are returned."""
        with self._lock:
            self._lent.clear()
            self._free_all()

    @staticmethod
    def _create(size: int) -> SharedMemory:
        buffer = SharedMemory("hv15-frames", size)
        try:
            buffer.offer()
        except BaseException:
            buffer.close()
            raise
        return buffer

    def _free_all(self) -> None:
        while self._free:
            self._free.pop().close()

    def _give_back(self, buffer: SharedMemory) -> None:
        with self._lock:
            if buffer not in self._lent:
                buffer.close()
                return
            self._lent.remove(buffer)
            self._free.append(buffer)
            for small, kept in ((True, KEPT_SMALL), (False, KEPT)):
                alike = [free for free in self._free if (free.size <= SMALL) == small]
                for free in alike[: max(0, len(alike) - kept)]:
                    self._free.remove(free)
                    free.close()


def open_tensor(shared: SharedTensor) -> Tensor:
    """Return a rank's view of a shared tensor.

    Raises OSError if the memory no longer exists, and ValueError if it is smaller than the tensor.
    """
    dtype = DTYPES[shared.dtype]
    size = torch.Size(shared.shape).numel() * dtype.itemsize
    if not size:
        return torch.empty(shared.shape, dtype=dtype)
    descriptor = open_shared(shared.place)
    try:
        mapping = mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
    return _view(mapping, dtype, shared.shape)


def _view(mapping: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(mapping, dtype=dtype, count=torch.Size(shape).numel()).view(shape)
