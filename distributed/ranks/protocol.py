"""The control connection between the controller and each rank: both ends.

Over loopback TCP, with `multiprocessing.connection` for framing and for the mutual HMAC challenge on a key that only
the group's folder holds; its pickling half is not used. A message is one frame of JSON, {"type": ..., fields}, and,
where "bytes" says so, a second frame of raw bytes.

    controller -> rank   job {id, job, checkpoint, frames} + latent, load {id, checkpoint, dtype, shared},
                         cancel {id}, release, stop
    rank -> controller   hello {rank, pid, device}, ready, beat {id, done, total, moved}, done {id},
                         failed {id, kind, ...}, released

Any doubt about the channel ends it: a rank whose channel ends exits, a controller whose rank's channel ends knows
that the rank is gone. A job that failed says so on a channel that lives on.
"""

import contextlib
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge

log = logging.getLogger(__name__)

HEADER_LIMIT = 64 * 1024
BYTES_LIMIT = 4 * 2**30
HANDSHAKE_SECONDS = 10
SEND_SECONDS = 10
"""How long a peer may take nothing of what is sent to it before its channel counts as broken."""
BROKEN = (EOFError, OSError, ValueError, AuthenticationError)
"""What a channel raises when it is no longer to be trusted."""


class Channel:
    """One end of an authenticated control connection. Sending is safe from several threads; one thread receives."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        with _socket_of(connection) as handle:
            limit = SEND_SECONDS * 1000 if os.name == "nt" else struct.pack("ll", SEND_SECONDS, 0)
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, type: str, raw: bytes | memoryview | None = None, **fields) -> None:
        """Send a message. Raises one of BROKEN where the other end takes nothing for SEND_SECONDS."""
        header = json.dumps({"type": type, "bytes": raw is not None, **fields}).encode()
        if not self._sending.acquire(timeout=SEND_SECONDS):
            raise TimeoutError("an earlier message is still under way")
        try:
            self._connection.send_bytes(header)
            if raw is not None:
                self._connection.send_bytes(raw)
        except TypeError as error:  # another thread closed it in mid-send, and took the handle away
            raise OSError("the connection was closed") from error
        finally:
            self._sending.release()

    def receive(self) -> tuple[dict, bytes | None]:
        """The next message and its raw bytes. Raises one of BROKEN when there is none to come."""
        message = json.loads(self._connection.recv_bytes(HEADER_LIMIT))
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise ValueError("not a message")
        return message, self._connection.recv_bytes(BYTES_LIMIT) if message.get("bytes") else None

    def close(self) -> None:
        """End the connection, waking whoever receives on it."""
        _shut(self._connection)


def _socket_of(connection: Connection) -> socket.socket:
    """Another handle on a connection's socket."""
    return socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM)


def _shut(connection: Connection) -> None:
    with contextlib.suppress(OSError), _socket_of(connection) as handle:
        handle.shutdown(socket.SHUT_RDWR)


def connect(address: tuple[str, int], key: bytes) -> Channel:
    """A rank's end. Raises AuthenticationError where the other side does not know the key either."""
    return Channel(Client(address, authkey=key))


class Door:
    """The controller's listening end, on loopback. Each caller that knows the key goes to `admit`, in its own thread.

    Strangers are turned away: the first is logged. Nobody can hold the door: every handshake has its own thread and
    ten seconds.
    """

    def __init__(self, key: bytes, admit: Callable[[Channel], None]) -> None:
        self._key, self._admit = key, admit
        self._listener = Listener(("127.0.0.1", 0), backlog=64)
        self._warned = False
        self._closed = False
        self.address: tuple[str, int] = self._listener.address
        self._thread = threading.Thread(target=self._accept, name="hv15-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more. Channels that were admitted live on."""
        self._closed = True
        for _ in range(20):
            with contextlib.suppress(OSError):  # a thread blocked in accept wakes only for a caller
                socket.create_connection(self.address, timeout=1).close()
            self._thread.join(0.1)
            if not self._thread.is_alive():
                break
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:  # the caller is gone again, or this process has no descriptor left
                if self._closed:
                    return
                time.sleep(0.1)
                continue
            if self._closed:
                connection.close()
                return
            threading.Thread(target=self._welcome, args=(connection,), name="hv15-rank", daemon=True).start()

    def _welcome(self, connection: Connection) -> None:
        limit = threading.Timer(HANDSHAKE_SECONDS, _shut, (connection,))
        limit.daemon = True
        limit.start()
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
        except BROKEN as error:
            connection.close()
            if not self._warned:
                self._warned = True
                log.warning("Turned away a stranger at the control port %d (%s).", self.address[1], error)
            return
        finally:
            limit.cancel()
        try:
            self._admit(Channel(connection))
        finally:
            connection.close()
