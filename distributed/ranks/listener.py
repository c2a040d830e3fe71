"""Control connections: a listening socket on loopback, and mutual authentication by the group's key.

    controller -> rank   32 random bytes
    rank -> controller   32 random bytes, and HMAC-SHA256(key, "rank" + both)
    controller -> rank   HMAC-SHA256(key, "controller" + both)

The key is in the group's folder, which only its owner can read. Other accounts of the machine can connect, too. One
thread serves all connections, at most HANDSHAKES at a time. Beyond that, the oldest are closed, so that other accounts
cannot exhaust this process's descriptors. A rank whose connection is closed in this way retries.
"""

import contextlib
import hmac
import logging
import random
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .protocol import TO_CONTROLLER, TO_RANK, Channel

log = logging.getLogger(__name__)

HANDSHAKES = 32
HANDSHAKE_SECONDS = 10
CONNECT_SECONDS = 60
"""Time for which a rank retries after its connection is closed during the handshake."""
REST_SECONDS = 0.1
NONCE = DIGEST = 32


def _proof(key: bytes, who: bytes, challenge: bytes, answer: bytes) -> bytes:
    return hmac.digest(key, who + challenge + answer, "sha256")


def connect(address: tuple[str, int], key: bytes) -> Channel:
    """Connect a rank to its controller and return the rank's end of the channel.

    If the connection is closed during the handshake, retry for CONNECT_SECONDS. Raises OSError or EOFError if the
    controller does not listen, and ValueError for a listener without the key.
    """
    limit = time.monotonic() + CONNECT_SECONDS
    while True:
        connection = socket.create_connection(address, timeout=HANDSHAKE_SECONDS)
        try:
            shake_hands(connection, key)
            return Channel(connection, TO_RANK)
        except (EOFError, ConnectionError):
            connection.close()
            if time.monotonic() > limit:
                raise
            time.sleep(random.uniform(0, REST_SECONDS))
        except BaseException:
            connection.close()
            raise


def shake_hands(connection: socket.socket, key: bytes) -> None:
    """Perform a rank's side of the handshake. Raises OSError, EOFError, ValueError for a listener without the key."""
    challenge = _receive(connection, NONCE)
    answer = secrets.token_bytes(NONCE)
    connection.sendall(answer + _proof(key, b"rank", challenge, answer))
    if not hmac.compare_digest(_receive(connection, DIGEST), _proof(key, b"controller", challenge, answer)):
        raise ValueError("the listener does not know the group's key")


def _receive(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        part = connection.recv(count - len(received))
        if not part:
            raise EOFError("the connection was closed during the handshake")
        received += part
    return received


@dataclass(eq=False)
class _Handshake:
    connection: socket.socket
    challenge: bytes
    limit: float
    received: bytearray = field(default_factory=bytearray)


class Listener:
    """The controller's listening socket. Only the first refused connection is logged.

    admit: called, in a new thread, with the channel of each authenticated peer.
    """

    def __init__(self, key: bytes, admit: Callable[[Channel], None]) -> None:
        self._key, self._admit = key, admit
        self._pending: dict[_Handshake, None] = {}
        """Oldest first."""
        self._warned = False
        with contextlib.ExitStack() as undo:
            self._socket = undo.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
            self._socket.setblocking(False)
            self.address: tuple[str, int] = self._socket.getsockname()
            self._closing, woken = (undo.enter_context(end) for end in socket.socketpair())
            self._selector = undo.enter_context(selectors.DefaultSelector())
            self._selector.register(self._socket, selectors.EVENT_READ, self._accept)
            self._selector.register(woken, selectors.EVENT_READ, None)
            self._thread = threading.Thread(target=self._serve, args=(woken,), name="hv15-listen", daemon=True)
            self._thread.start()
            undo.pop_all()

    def close(self) -> None:
        """Stop listening, and return when the thread has ended. Channels that were admitted stay open."""
        self._closing.close()
        self._thread.join()

    def _serve(self, woken: socket.socket) -> None:
        with self._socket, woken, self._selector:
            while True:
                try:
                    for ready, _ in self._selector.select(REST_SECONDS if self._pending else None):
                        if ready.fileobj is woken:
                            for handshake in list(self._pending):
                                self._end(handshake)
                            return
                        ready.data()
                    for handshake in [h for h in self._pending if h.limit < time.monotonic()]:
                        self._refuse(handshake, "the handshake timed out")
                except Exception:  # this thread must continue, because ranks connect through it
                    log.exception("An error occurred on the control port.")
                    time.sleep(REST_SECONDS)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):  # the peer has closed the connection
            return
        except OSError:  # this process is out of descriptors
            if self._pending:
                self._refuse(next(iter(self._pending)), "this process is out of file descriptors")
            else:
                time.sleep(REST_SECONDS)
            return
        handshake = _Handshake(connection, secrets.token_bytes(NONCE), time.monotonic() + HANDSHAKE_SECONDS)
        self._pending[handshake] = None
        try:
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._advance(handshake))
            connection.send(handshake.challenge)
        except OSError as error:
            self._refuse(handshake, error)
        if len(self._pending) > HANDSHAKES:
            self._refuse(next(iter(self._pending)), "too many connections at a time")

    def _advance(self, handshake: _Handshake) -> None:
        if handshake not in self._pending:  # it was refused in favour of another after `select` had returned both
            return
        try:
            part = handshake.connection.recv(NONCE + DIGEST - len(handshake.received))
        except BlockingIOError:
            return
        except OSError as error:
            self._refuse(handshake, error)
            return
        handshake.received += part
        answer, proof = bytes(handshake.received[:NONCE]), bytes(handshake.received[NONCE:])
        if not part:
            self._refuse(handshake, "it was closed during the handshake")
        elif len(proof) == DIGEST:
            if hmac.compare_digest(proof, _proof(self._key, b"rank", handshake.challenge, answer)):
                self._welcome(handshake, answer)
            else:
                self._refuse(handshake, "the peer does not know the group's key")

    def _welcome(self, handshake: _Handshake, answer: bytes) -> None:
        self._end(handshake, keep=True)
        channel = Channel(handshake.connection, TO_CONTROLLER)
        try:
            handshake.connection.send(_proof(self._key, b"controller", handshake.challenge, answer))
            threading.Thread(target=self._talk, args=(channel,), name="hv15-rank", daemon=True).start()
        except (OSError, RuntimeError) as error:  # the peer closed the connection, or no thread can be started
            log.warning("A rank could not be admitted: %s.", error)
            channel.close()

    def _talk(self, channel: Channel) -> None:
        try:
            self._admit(channel)
        finally:
            channel.close()

    def _refuse(self, handshake: _Handshake, reason: object) -> None:
        if not self._warned:
            self._warned = True
            log.warning("Refused an unauthenticated connection on control port %d (%s).", self.address[1], reason)
        self._end(handshake)

    def _end(self, handshake: _Handshake, keep: bool = False) -> None:
        del self._pending[handshake]
        with contextlib.suppress(KeyError, ValueError):  # not registered yet
            self._selector.unregister(handshake.connection)
        if not keep:
            handshake.connection.close()
