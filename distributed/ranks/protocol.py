"""The control connection between the controller and each rank: every message on it, and a channel for them.

A frame is four bytes with the length of what follows, and a JSON object {"type": name, field: value, ...}. Tensors
travel through shared buffers (`buffers`), never on the connection. Each message is a frozen dataclass below; what
arrives is checked field by field against it.

Any doubt about a channel ends it: a rank whose channel ends exits, and a controller whose rank's channel ends replaces
the group. A job that failed is no such doubt; it is reported on a channel that lives on. `listener` has the handshake.
"""

import contextlib
import json
import math
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, get_type_hints

from .buffers import SharedTensor

SEND_SECONDS = 10
"""How long a peer may take nothing of what is sent to it before its channel counts as broken."""
BROKEN = (EOFError, OSError, ValueError)
"""What a channel raises when it is no longer to be trusted."""
MESSAGE_LENGTH = 4000
"""Characters of an error that a rank reports."""
MOST = 2**53
"""JSON numbers above this are not whole numbers everywhere."""


def _cut(value: Any) -> str:
    return repr(str(value)[:80])


def _whole(least: int = 0, most: int = MOST) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{_cut(value)} is no whole number from {least} to {most}")
        return value

    return check


def _text(longest: int, *allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > longest or (allowed and value not in allowed):
            raise ValueError(f"{_cut(value)} is no text of at most {longest} characters{allowed or ''}")
        return value

    return check


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{_cut(value)} is neither true nor false")
    return value


def _object(value: Any) -> dict:
    if type(value) is not dict:
        raise ValueError(f"{_cut(value)} is no object")
    return value


def _tensors(value: Any) -> dict[str, SharedTensor]:
    return {name: SharedTensor.from_json(place) for name, place in _object(value).items()}


Whole = Annotated[int, _whole()]
Flag = Annotated[bool, _flag]
Kind = Annotated[str, _text(64)]
Fields = Annotated[dict, _object]
Tensors = Annotated[dict[str, SharedTensor], _tensors]


@dataclass(frozen=True)
class Load:
    """Have the task of this kind load something for the runs to come."""

    id: Whole
    kind: Kind
    fields: Fields
    inputs: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Run a job: read the inputs, fill the outputs."""

    id: Whole
    kind: Kind
    fields: Fields
    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Cancel:
    """End a job early, at the next place where all ranks agree on it."""

    id: Whole


@dataclass(frozen=True)
class Release:
    """Give back all device memory."""


@dataclass(frozen=True)
class Stop:
    """End the process."""


@dataclass(frozen=True)
class Hello:
    """The first message of a rank."""

    rank: Whole
    pid: Annotated[int, _whole(1)]
    device: Annotated[str, _text(64)]


@dataclass(frozen=True)
class Ready:
    """The rank has come up and takes jobs."""


@dataclass(frozen=True)
class Released:
    """The device memory was given back."""


@dataclass(frozen=True)
class Beat:
    """Sent twice a second. `moved` grows with every sign of progress in job `id`."""

    id: Whole
    done: Whole
    total: Whole
    moved: Whole


@dataclass(frozen=True)
class Done:
    """The job is done on this rank. All of its work is."""

    id: Whole
    done: Whole
    total: Whole


@dataclass(frozen=True)
class Failed:
    """The job failed on this rank, which lives on. The numbers belong to the reason "memory", in bytes.

    peers_waiting: other ranks may wait for this one inside the job, and can only be ended.
    """

    id: Whole
    reason: Annotated[str, _text(16, "error", "memory", "not loaded", "cancelled")]
    message: Annotated[str, _text(MESSAGE_LENGTH)] = ""
    peers_waiting: Flag = False
    needed: Whole = 0
    free: Whole = 0
    smallest_plan: Flag = False


Message = Load | Run | Cancel | Release | Stop | Hello | Ready | Released | Beat | Done | Failed


class Direction(NamedTuple):
    """The messages that travel one way, and the most bytes that one of them may have."""

    messages: tuple[type, ...]
    limit: int


TO_RANK = Direction((Load, Run, Cancel, Release, Stop), 2**20)
TO_CONTROLLER = Direction((Hello, Ready, Released, Beat, Done, Failed), 2**16)

_CHECKS = {
    message: {name: hint.__metadata__[0] for name, hint in get_type_hints(message, include_extras=True).items()}
    for message in TO_RANK.messages + TO_CONTROLLER.messages
}


def encode(message: Message) -> bytes:
    """Return a message's JSON. Raises ValueError for what JSON cannot hold, and for a message that is too long."""
    limit = next(way.limit for way in (TO_RANK, TO_CONTROLLER) if type(message) in way.messages)
    try:
        value = {"type": type(message).__name__, **vars(message)}
        frame = json.dumps(value, allow_nan=False, default=_plain).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not a message: {error}") from error
    if len(frame) > limit:
        raise ValueError(f"{type(message).__name__} has {len(frame)} bytes; {limit} is the most")
    return frame


def _plain(value: Any) -> dict:
    if not isinstance(value, SharedTensor):
        raise TypeError(f"{type(value).__name__} is not JSON")
    return vars(value)


def decode(frame: bytes, direction: Direction) -> Message:
    """Return the message in a frame. Raises ValueError for everything that is not one of the direction's messages."""
    try:
        value = _object(json.loads(frame, parse_constant=_finite, parse_float=_finite))
    except RecursionError:
        raise ValueError("not a message: it is nested too deeply") from None
    name = value.pop("type", None)
    for message in direction.messages:
        if message.__name__ == name:
            break
    else:
        raise ValueError(f"unknown message {_cut(name)}")
    checks = _CHECKS[message]
    if value.keys() != checks.keys():
        raise ValueError(f"{name} has the fields {sorted(checks)}, not {_cut(sorted(value))}")
    fields = {}
    for key, check in checks.items():
        try:
            fields[key] = check(value[key])
        except ValueError as error:
            raise ValueError(f"{name}.{key}: {error}") from None
    return message(**fields)


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"not a message: {digits[:80]} is not finite")
    return number


class Channel:
    """One end of an authenticated control connection. Sending is safe from several threads; one thread receives."""

    def __init__(self, connection: socket.socket, receives: Direction) -> None:
        self._connection, self._receives = connection, receives
        self._reader = connection.makefile("rb")
        self._sending = threading.Lock()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit = SEND_SECONDS * 1000 if os.name == "nt" else struct.pack("ll", SEND_SECONDS, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, message: Message) -> None:
        """Send a message. Raises one of BROKEN where the other end takes nothing for SEND_SECONDS."""
        self.send_frame(encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Send a message that was encoded before."""
        if not self._sending.acquire(timeout=SEND_SECONDS):
            raise TimeoutError("an earlier message is still in flight")
        try:
            self._connection.sendall(struct.pack("!I", len(frame)) + frame)
        finally:
            self._sending.release()

    def receive(self) -> Message:
        """Return the next message. Raises one of BROKEN when there is none to come, or one that is not understood."""
        (length,) = struct.unpack("!I", self._read(4))
        if length > self._receives.limit:
            raise ValueError(f"a message of {length} bytes; {self._receives.limit} is the most")
        return decode(self._read(length), self._receives)

    def shut(self) -> None:
        """End the connection, waking whoever receives or sends on it. Any thread may call this."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and free its descriptor. For the thread that receives."""
        self.shut()
        with self._sending:  # a send on a descriptor that is free again could reach another connection
            self._reader.close()
            self._connection.close()

    def _read(self, count: int) -> bytes:
        read = self._reader.read(count)
        if len(read) < count:
            raise EOFError("the connection was closed")
        return read
