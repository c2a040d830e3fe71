"""The control connection between the controller and each rank: all messages, and the channel that carries them.

A frame is a length of four bytes, followed by a JSON object {"type": name, field: value, ...} of that length. Tensors
are passed through shared memory (`buffers`), never over the connection. Each message is a frozen dataclass below;
received messages are checked field by field.

Any error on a channel ends it: the rank exits, and the controller replaces the group. The failure of a job is not such
an error; it is reported over the channel, which stays open. The handshake is in `listener`.
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
"""Time limit for sending, after which the channel is considered broken."""
BROKEN = (EOFError, OSError, ValueError)
"""Exceptions of a channel that is broken and must not be used any more."""
MESSAGE_LENGTH = 4000
"""Maximum length of an error message that a rank reports, in characters."""
MOST = 2**53
"""Maximum integer. JSON implementations that use doubles cannot represent all larger integers."""


def _cut(value: Any) -> str:
    return repr(str(value)[:80])


def _whole(least: int = 0, most: int = MOST) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{_cut(value)} is not an integer from {least} to {most}")
        return value

    return check


def _text(longest: int, *allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > longest or (allowed and value not in allowed):
            choices = f" out of {', '.join(allowed)}" if allowed else ""
            raise ValueError(f"{_cut(value)} is not a string of at most {longest} characters{choices}")
        return value

    return check


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{_cut(value)} is not a boolean")
    return value


def _object(value: Any) -> dict:
    if type(value) is not dict:
        raise ValueError(f"{_cut(value)} is not an object")
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
    """Load data for later runs of this kind of task."""

    id: Whole
    kind: Kind
    fields: Fields
    inputs: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Run a job, which reads the inputs and fills the outputs.

    may_decline: whether the ranks answer "no room" if their free memory is not enough for full speed.
    """

    id: Whole
    kind: Kind
    fields: Fields
    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)
    may_decline: Flag = False


@dataclass(frozen=True)
class Cancel:
    """Cancel a job at the next point where all ranks can agree on it."""

    id: Whole


@dataclass(frozen=True)
class Release:
    """Free all device memory."""


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
    """The rank has started and accepts jobs."""


@dataclass(frozen=True)
class Released:
    """The device memory was freed."""


@dataclass(frozen=True)
class Beat:
    """A heartbeat, sent twice a second. `moved` increases with every sign of progress in job `id`."""

    id: Whole
    done: Whole
    total: Whole
    moved: Whole


@dataclass(frozen=True)
class Done:
    """The rank has completed its part of the job, so `done` equals `total`."""

    id: Whole
    done: Whole
    total: Whole


@dataclass(frozen=True)
class Failed:
    """The job failed on this rank, which keeps running.

    needed, free: sizes in bytes, and smallest_plan, as in `OutOfMemory`, for the reason "memory". peers_waiting:
    whether other ranks may wait for this rank inside the job, so that the group must be restarted.
    """

    id: Whole
    reason: Annotated[str, _text(16, "error", "memory", "not loaded", "no room", "cancelled")]
    message: Annotated[str, _text(MESSAGE_LENGTH)] = ""
    peers_waiting: Flag = False
    needed: Whole = 0
    free: Whole = 0
    smallest_plan: Flag = False


Message = Load | Run | Cancel | Release | Stop | Hello | Ready | Released | Beat | Done | Failed


class Direction(NamedTuple):
    """The messages of one direction, and the maximum length of their JSON in bytes."""

    messages: tuple[type, ...]
    limit: int


TO_RANK = Direction((Load, Run, Cancel, Release, Stop), 2**20)
TO_CONTROLLER = Direction((Hello, Ready, Released, Beat, Done, Failed), 2**16)

_CHECKS = {
    message: {name: hint.__metadata__[0] for name, hint in get_type_hints(message, include_extras=True).items()}
    for message in TO_RANK.messages + TO_CONTROLLER.messages
}


def encode(message: Message) -> bytes:
    """Return a message as JSON. Raises ValueError for values that JSON does not support and for too long messages."""
    limit = next(way.limit for way in (TO_RANK, TO_CONTROLLER) if type(message) in way.messages)
    try:
        value = {"type": type(message).__name__, **vars(message)}
        frame = json.dumps(value, allow_nan=False, default=_plain).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not a message: {error}") from error
    if len(frame) > limit:
        raise ValueError(f"{type(message).__name__} has {len(frame)} bytes; the limit is {limit}")
    return frame


def _plain(value: Any) -> dict:
    if not isinstance(value, SharedTensor):
        raise TypeError(f"{type(value).__name__} is not JSON")
    return vars(value)


def decode(frame: bytes, direction: Direction) -> Message:
    """Return the message in a frame. Raises ValueError if it is not a valid message of this direction."""
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
    """One end of an authenticated control connection. Any thread may send; only one thread may receive."""

    def __init__(self, connection: socket.socket, receives: Direction) -> None:
        self._connection, self._receives = connection, receives
        self._reader = connection.makefile("rb")
        self._sending = threading.Lock()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit = SEND_SECONDS * 1000 if os.name == "nt" else struct.pack("ll", SEND_SECONDS, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, message: Message) -> None:
        """Send a message. Raises one of BROKEN if the peer does not receive it within SEND_SECONDS."""
        self.send_frame(encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Send an encoded message. Raises what `send` raises."""
        if not self._sending.acquire(timeout=SEND_SECONDS):
            raise TimeoutError("an earlier message is still being sent")
        try:
            self._connection.sendall(struct.pack("!I", len(frame)) + frame)
        finally:
            self._sending.release()

    def receive(self) -> Message:
        """Return the next message. Raises one of BROKEN if the connection ends or the message is invalid."""
        (length,) = struct.unpack("!I", self._read(4))
        if length > self._receives.limit:
            raise ValueError(f"a message of {length} bytes; the limit is {self._receives.limit}")
        return decode(self._read(length), self._receives)

    def shut(self) -> None:
        """Shut the connection down and wake the threads that send or receive. Any thread may call this method."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection and its descriptor. Only the receiving thread may call this method."""
        self.shut()
        with self._sending:  # the descriptor may be reused by another connection as soon as it is closed
            self._reader.close()
            self._connection.close()

    def _read(self, count: int) -> bytes:
        read = self._reader.read(count)
        if len(read) < count:
            raise EOFError("the connection was closed")
        return read
