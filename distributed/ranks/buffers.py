"""Memory that the controller shares with its ranks: inputs and weights that they read, outputs that they write.

On Linux a buffer is a memfd, which no size of /dev/shm or of /tmp limits and nobody else can name. A rank asks the
controller for it at a socket (`Offers`) and gets its descriptor. The controller's /proc entry would be simpler, but may
not be read where the interpreter has capabilities, or the process is not dumpable. Elsewhere a buffer is a private
temporary file. Buffers are sealed: no rank can cut one short, which would kill the controller with a bus error.

Outputs are handed out as a tensor without a copy. When the tensor and all views of it are gone the buffer returns to
its pool, its pages already there for the next job, or is freed where the pool was trimmed.
"""

import contextlib
import mmap
import os
import secrets
import socket
import struct
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .memory import available_memory, describe_memory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

KEPT = 2
"""Large buffers that are kept for the next jobs."""
SMALL = 2**26
"""Bytes up to which a buffer counts as small. KEPT_SMALL of those are kept."""
KEPT_SMALL = 16
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
}
DIMENSIONS = 8
PLACE_LENGTH = 4096
ASK_SECONDS = 5
LINUX = sys.platform == "linux"
_MEMFD = "memfd:"
"""What the place of memory begins with that is not a file's path."""
_TOKEN_BYTES = 32


class _Mapping(mmap.mmap):
    """An mmap whose end can be awaited: a tensor made from it keeps it alive."""


class Offers:
    """Open files that other processes of this user may have: whoever knows a file's name, which is secret, gets it.

    It listens on an abstract Unix socket, which needs no folder and ends with this process, while there is something to
    offer. Other accounts are turned away by the account that the kernel says they have.
    """

    def __init__(self) -> None:
        self._files: dict[bytes, int] = {}
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._owner = 0

    def add(self, descriptor: int) -> str:
        """Offer an open file. Returns the place by which `open_shared` gets it, until `withdraw`."""
        token = secrets.token_hex(_TOKEN_BYTES // 2)
        with self._lock:
            if self._listener is None or self._owner != os.getpid():  # in a forked child it is the parent's
                self._listen()
            self._files[token.encode()] = descriptor
            return self._place(token)

    def place_of(self, path: Path) -> str | None:
        """The place of the open file that `path` leads to, if it is offered."""
        with self._lock:
            for token, descriptor in self._files.items():
                if path == descriptor_path(descriptor):
                    return self._place(token.decode())
        return None

    def _place(self, token: str) -> str:
        return f"{_MEMFD}{self._listener.getsockname()[1:].decode()}/{token}"

    def withdraw(self, place: str) -> None:
        """Offer the file no longer. Those who have it keep it."""
        with self._lock:
            self._files.pop(place.rpartition("/")[2].encode(), None)
            if not self._files and self._listener and self._owner == os.getpid():
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes it
                self._listener = None

    def _listen(self) -> None:
        self._listener, self._owner = socket.socket(socket.AF_UNIX), os.getpid()
        self._listener.bind(f"\0hv15-{secrets.token_hex(8)}")
        self._listener.listen(64)
        threading.Thread(target=self._serve, args=(self._listener,), name="hv15-offers", daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        with listener:
            while self._listener is listener:
                try:
                    caller, _ = listener.accept()
                except OSError:  # it was shut down, or this process has no descriptor left
                    time.sleep(0.1)
                    continue
                with contextlib.suppress(OSError), caller:
                    self._answer(caller)

    def _answer(self, caller: socket.socket) -> None:
        _, account, _ = struct.unpack("3i", caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if account == os.geteuid():
            caller.settimeout(ASK_SECONDS)
            token = caller.recv(_TOKEN_BYTES)
            with self._lock:
                if token in self._files:
                    socket.send_fds(caller, [b"."], [self._files[token]])


_offers = Offers()


def open_shared(place: str) -> int:
    """A new descriptor of shared memory, in any process of the user that shares it. Raises OSError."""
    if not place.startswith(_MEMFD):
        return os.open(place, os.O_RDWR | getattr(os, "O_BINARY", 0))
    name, _, token = place.removeprefix(_MEMFD).partition("/")
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(ASK_SECONDS)
        caller.connect(f"\0{name}")
        caller.sendall(token.encode())
        _, descriptors, _, _ = socket.recv_fds(caller, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not descriptors:
        raise FileNotFoundError("The controller no longer shares this memory.")
    return descriptors[0]


class SharedMemory:
    """Memory of `size` bytes that other processes can open once it was offered.

    Raises MemoryError, with the numbers, where the machine or the container has not so much, and OSError.
    """

    def __init__(self, name: str, size: int, suffix: str = "") -> None:
        if size > available_memory():
            raise MemoryError(f"{size / 2**30:.2f} GiB of memory is needed; {describe_memory()}.")
        self.size = size
        self.place = ""
        self._owner = os.getpid()
        if LINUX:
            self.descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.fchmod(self.descriptor, 0o600)
        else:
            self.descriptor, self.place = tempfile.mkstemp(suffix, f"{name}-")
        try:
            os.ftruncate(self.descriptor, size)
        except OSError:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """A path by which this process can open it."""
        return descriptor_path(self.descriptor) if LINUX else Path(self.place)

    def offer(self, read_only: bool = False) -> None:
        """Seal it, and let other processes open it by its `place`. If it is to be read only it must not be mapped."""
        if LINUX:
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals | (fcntl.F_SEAL_WRITE if read_only else 0))
            self.place = _offers.add(self.descriptor)

    def close(self) -> None:
        """Free the memory, once nobody maps it."""
        if LINUX:
            _offers.withdraw(self.place)
        elif os.getpid() == self._owner:
            Path(self.place).unlink(missing_ok=True)
        os.close(self.descriptor)


@dataclass(frozen=True)
class SharedTensor:
    """What a rank needs to open a shared tensor. JSON-able."""

    place: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def from_json(cls, value: object) -> "SharedTensor":
        """Read what became of one in JSON. Raises ValueError for anything else."""
        if not isinstance(value, dict) or value.keys() != {"place", "dtype", "shape"}:
            raise ValueError(f"{str(value)[:80]!r} is no shared tensor")
        place, dtype, shape = value["place"], value["dtype"], value["shape"]
        if type(dtype) is not str or dtype not in DTYPES:
            raise ValueError(f"a shared tensor cannot be {str(dtype)[:80]}; it must be one of {', '.join(DTYPES)}")
        if type(place) is not str or len(place) > PLACE_LENGTH:
            raise ValueError(f"{str(place)[:80]!r} is no place of a shared tensor")
        if type(shape) is not list or len(shape) > DIMENSIONS:
            raise ValueError(f"{str(shape)[:80]} is no shape of a shared tensor")
        if not all(type(size) is int and 0 <= size < 2**53 for size in shape):
            raise ValueError(f"{str(shape)[:80]} is no shape of a shared tensor")
        return cls(place, dtype, tuple(shape))


@dataclass
class SharedBuffers:
    """Shared memory for tensors, reused."""

    _free: list[SharedMemory] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _lent: set[SharedMemory] = field(default_factory=set)

    @property
    def lent(self) -> int:
        """How many buffers will return to the pool."""
        return len(self._lent)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, SharedTensor]:
        """Return a tensor, with whatever its memory held before, and what ranks open it by (see `open_tensor`).

        Raises MemoryError, with the numbers, where there is not so much memory, and OSError.
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
        """Free what is not lent now, and what is lent as soon as it comes back."""
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
    """Return a rank's view of a tensor. Raises OSError where it is gone, ValueError where its memory is too short."""
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


def place_of(path: Path) -> str:
    """What a rank gets the file at `path` by (see `local_path`): memory offered under that path, or the path itself."""
    return _offers.place_of(path) or str(path)


_received: dict[str, int] = {}
"""The descriptor of the memory that `local_path` was asked for last. A path leads to it for as long as it is open."""


def local_path(place: str) -> Path:
    """A path by which this process can open a file of its controller's, until it asks for another. Raises OSError."""
    if not place.startswith(_MEMFD):
        return Path(place)
    if place not in _received:
        descriptor = open_shared(place)
        while _received:  # closed after the new one is open, so that two that follow each other have two paths
            os.close(_received.popitem()[1])
        _received[place] = descriptor
    return descriptor_path(_received[place])


def descriptor_path(descriptor: int) -> Path:
    """The path of an open file of this process."""
    return Path(f"/proc/{os.getpid()}/fd/{descriptor}")
