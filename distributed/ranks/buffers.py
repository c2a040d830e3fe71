"""The frame buffer that ranks write and the graph reads: shared memory, handed out as a tensor without a copy.

On Linux it is a memfd, which no size of /dev/shm limits and nobody else can name; ranks open it through the
controller's /proc entry. Elsewhere it is a private temporary file. When the tensor and all views of it are gone the
buffer returns to its pool, its pages already there for the next decode, or is freed where the pool was trimmed.
"""

import mmap
import os
import tempfile
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

KEPT = 2
"""Free buffers that a pool keeps for the next decodes."""


class _Mapping(mmap.mmap):
    """An mmap whose end can be awaited: a tensor made from it keeps it alive."""


@dataclass(eq=False)
class _Buffer:
    descriptor: int
    size: int
    path: str
    file: Path | None

    def close(self) -> None:
        os.close(self.descriptor)
        if self.file:
            self.file.unlink(missing_ok=True)


@dataclass
class FramePool:
    """Shared buffers, reused."""

    _free: list[_Buffer] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _lent: set[_Buffer] = field(default_factory=set)

    @property
    def lent(self) -> int:
        """How many buffers will return to the pool."""
        return len(self._lent)

    def allocate(self, shape: tuple[int, ...]) -> tuple[Tensor, str]:
        """A float32 tensor of this shape, and the path by which another process of this user opens its memory."""
        size = torch.Size(shape).numel() * 4
        with self._lock:
            fitting = [buffer for buffer in self._free if size <= buffer.size <= 2 * size]
            buffer = min(fitting, key=lambda b: b.size, default=None)
            if buffer:
                self._free.remove(buffer)
        buffer = buffer or self._create(size)
        try:
            mapping = _Mapping(buffer.descriptor, buffer.size)
        except (OSError, ValueError):
            buffer.close()
            raise
        with self._lock:
            self._lent.add(buffer)
        weakref.finalize(mapping, self._give_back, buffer)
        return torch.frombuffer(mapping, dtype=torch.float32, count=size // 4).view(shape), buffer.path

    def trim(self) -> None:
        """Free what is not lent now, and what is lent as soon as it comes back."""
        with self._lock:
            self._lent.clear()
            while self._free:
                self._free.pop().close()

    def _create(self, size: int) -> _Buffer:
        if hasattr(os, "memfd_create"):
            descriptor, file = os.memfd_create("hv15-frames", os.MFD_CLOEXEC), None
            path = f"/proc/{os.getpid()}/fd/{descriptor}"
        else:
            descriptor, path = tempfile.mkstemp(prefix="hv15-frames-")
            file = Path(path)
        buffer = _Buffer(descriptor, size, path, file)
        try:
            os.ftruncate(descriptor, size)
        except OSError:
            buffer.close()
            raise
        return buffer

    def _give_back(self, buffer: _Buffer) -> None:
        with self._lock:
            if buffer not in self._lent:
                buffer.close()
                return
            self._lent.remove(buffer)
            self._free.append(buffer)
            while len(self._free) > KEPT:
                self._free.pop(0).close()


def open_frames(path: str, shape: tuple[int, ...]) -> Tensor:
    """A rank's view of a buffer: float32, shared with the controller and all other ranks."""
    count = torch.Size(shape).numel()
    with open(path, "r+b") as file:
        mapping = mmap.mmap(file.fileno(), count * 4)
    return torch.frombuffer(mapping, dtype=torch.float32, count=count).view(shape)
