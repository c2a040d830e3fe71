"""Shared memory of the controller that other processes of the same user open by a secret name.

On Linux this is a memfd, which neither the size of /dev/shm nor that of /tmp limits and which no other account can
open. A rank requests it from the controller over a socket (`Offers`) and receives its descriptor. Opening it through
the controller's /proc entries would be simpler, but these cannot be read if the interpreter has capabilities or the
process is not dumpable. On other systems it is a private temporary file.

The memory is sealed: no rank can truncate it, which would kill the controller with a bus error.
"""

import contextlib
import os
import secrets
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .memory import available_memory, describe_memory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

REQUEST_SECONDS = 5
LINUX = sys.platform == "linux"
_MEMFD = "memfd:"
"""Prefix of the place of a memfd. Any other place is the path of a file."""
_TOKEN_BYTES = 32


class Offers:
    """Open files that other processes of this user can request by a secret token.

    While any file is offered, a thread listens on an abstract Unix socket, which needs no folder and disappears with
    this process. Requests from other accounts are refused by the account that the kernel reports for the caller.
    """

    def __init__(self) -> None:
        self._files: dict[bytes, int] = {}
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._owner = 0

    def add(self, descriptor: int) -> str:
        """Offer an open file until `withdraw`. Return its place, the argument of `open_shared`."""
        token = secrets.token_hex(_TOKEN_BYTES // 2)
        with self._lock:
            if self._listener is None or self._owner != os.getpid():  # a forked child has its parent's listener
                self._listen()
            self._files[token.encode()] = descriptor
            return self._place(token)

    def place_of(self, path: Path) -> str | None:
        """Return the place of the offered file that `path` refers to, or None if there is no such file."""
        with self._lock:
            for token, descriptor in self._files.items():
                if path == descriptor_path(descriptor):
                    return self._place(token.decode())
        return None

    def _place(self, token: str) -> str:
        return f"{_MEMFD}{self._listener.getsockname()[1:].decode()}/{token}"

    def withdraw(self, place: str) -> None:
        """Stop offering the file. Processes that have opened it keep it."""
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
                except OSError:  # the listener was shut down, or this process is out of descriptors
                    time.sleep(0.1)
                    continue
                with contextlib.suppress(OSError), caller:
                    self._answer(caller)

    def _answer(self, caller: socket.socket) -> None:
        _, account, _ = struct.unpack("3i", caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if account == os.geteuid():
            caller.settimeout(REQUEST_SECONDS)
            token = caller.recv(_TOKEN_BYTES)
            with self._lock:
                if token in self._files:
                    socket.send_fds(caller, [b"."], [self._files[token]])


_offers = Offers()


class SharedMemory:
    """Memory of `size` bytes that other processes can open after `offer`.

    Raises MemoryError, with the numbers, if the machine or the container has less memory available; and OSError.
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
        """A path under which this process can open the memory."""
        return descriptor_path(self.descriptor) if LINUX else Path(self.place)

    def offer(self, read_only: bool = False) -> None:
        """Seal the memory and let other processes open it by its `place`. It must not be mapped if it is read-only."""
        if LINUX:
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals | (fcntl.F_SEAL_WRITE if read_only else 0))
            self.place = _offers.add(self.descriptor)

    def close(self) -> None:
        """Close the memory, which is freed when no process maps it any more."""
        if LINUX:
            _offers.withdraw(self.place)
        elif os.getpid() == self._owner:
            Path(self.place).unlink(missing_ok=True)
        os.close(self.descriptor)


def open_shared(place: str) -> int:
    """Return a new descriptor of shared memory, in any process of the same user. Raises OSError."""
    if not place.startswith(_MEMFD):
        return os.open(place, os.O_RDWR | getattr(os, "O_BINARY", 0))
    name, _, token = place.removeprefix(_MEMFD).partition("/")
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(REQUEST_SECONDS)
        caller.connect(f"\0{name}")
        caller.sendall(token.encode())
        _, descriptors, _, _ = socket.recv_fds(caller, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not descriptors:
        raise FileNotFoundError("The controller no longer shares this memory.")
    return descriptors[0]


def place_of(path: Path) -> str:
    """Return the place of the file at `path`, the argument of `local_path`: an offered file's place, or the path."""
    return _offers.place_of(path) or str(path)


_received: dict[str, int] = {}
"""Descriptor of the memory that `local_path` opened last, by its place. Its path is valid while it is open."""


def local_path(place: str) -> Path:
    """Return a path under which this process can open a file of its controller. Raises OSError.

    The path of shared memory is valid until the next call with another place.
    """
    if not place.startswith(_MEMFD):
        return Path(place)
    if place not in _received:
        descriptor = open_shared(place)
        while _received:  # closed after the new one is open, so that consecutive places have different paths
            os.close(_received.popitem()[1])
        _received[place] = descriptor
    return descriptor_path(_received[place])


@contextlib.contextmanager
def shared_file(place: str) -> Iterator[Path]:
    """Yield a path under which this process can open a file of its controller, within the context. Raises OSError.

    Unlike `local_path`, it does not keep shared memory open, which would keep it from being freed.
    """
    if not place.startswith(_MEMFD):
        yield Path(place)
        return
    descriptor = open_shared(place)
    try:
        yield descriptor_path(descriptor)
    finally:
        os.close(descriptor)


def descriptor_path(descriptor: int) -> Path:
    """Return the path of an open file of this process."""
    return Path(f"/proc/{os.getpid()}/fd/{descriptor}")
