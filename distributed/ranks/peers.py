"""Authenticated connections between ranks.

gloo listens on a loopback port while a process group is created, and accepts the first connection as its peer. Every
account of the machine can connect. Therefore the ranks of a new group first wait for each other, which leaves other
programs little time to connect. Then each pair of ranks proves that both know the group's key, which only the owner of
the private folder can read. If a proof is wrong or missing, another program is connected in place of a rank, and the
ranks exit. Afterwards the listening sockets of gloo are closed, so no program can connect to running ranks.
"""

import contextlib
import datetime
import hmac
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import GroupError
from .devices import Device
from .environment import RankEnvironment

PROOF_SECONDS = 10
"""Time limit for the proofs of the other ranks after the connection is established."""
FOREVER = datetime.timedelta(days=1)
"""Timeout of collectives. Ranks that hang are detected by their lack of progress, not by this timeout."""


def connect_world(started: RankEnvironment, device: Device) -> None:
    """Initialise torch.distributed with the group's other ranks. A collective.

    If another program connected in place of a rank, raises ConnectionError, or RuntimeError if gloo fails because of
    the data that the program sent.
    """
    ranks = range(len(started.devices))
    store = dist.FileStore(str(started.folder / "store"), len(ranks))
    store.set_timeout(FOREVER)
    store.set(f"ready {started.rank}", "")
    for rank in ranks:
        store.get(f"ready {rank}")
    dist.init_process_group(
        device.collective_backend(started.backend),
        store=store,
        rank=started.rank,
        world_size=len(ranks),
        device_id=device.process_group_device,
        timeout=FOREVER,
    )
    close_listeners()
    _prove(started, ranks, None)


def new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """Create a process group of some ranks. A collective of all ranks.

    Raises GroupError if it fails, because the ranks cannot know which of them have connected.
    """
    dist.all_reduce(torch.zeros(1))  # so that all ranks connect at the same time
    try:
        group = dist.new_group(ranks)
        close_listeners()
        if dist.get_rank() in ranks:
            _prove(RankEnvironment.from_env(), ranks, group)
    except (RuntimeError, ConnectionError) as error:
        raise GroupError(f"The ranks {list(ranks)} could not connect to each other: {error}") from error
    return group


def _prove(started: RankEnvironment, ranks: Sequence[int], group: dist.ProcessGroup | None) -> None:
    """Exchange proofs with every other rank of a process group.

    Raises ConnectionError if a rank sends a wrong proof, or none within PROOF_SECONDS.
    """
    key = (started.folder / "key").read_bytes()
    here, others = started.rank, [rank for rank in ranks if rank != started.rank]

    def proof(sender: int, receiver: int) -> bytes:
        return hmac.digest(key, f"{list(ranks)}: {sender} to {receiver}".encode(), "sha256")

    sent = {other: torch.tensor(list(proof(here, other)), dtype=torch.uint8) for other in others}
    received = {other: torch.zeros_like(tensor) for other, tensor in sent.items()}
    works = [(other, dist.isend(sent[other], other, group)) for other in others]
    works += [(other, dist.irecv(received[other], other, group)) for other in others]
    for other, work in works:
        try:
            work.wait(datetime.timedelta(seconds=PROOF_SECONDS))
        except RuntimeError as error:
            raise ConnectionError(f"Rank {other} did not authenticate: {error}") from error
    for other in others:
        if not hmac.compare_digest(bytes(received[other].tolist()), proof(other, here)):
            raise ConnectionError(f"Another program is connected in place of rank {other}.")


def close_listeners() -> None:
    """Close the listening sockets of gloo, which it needs only while it creates a process group. On Linux only.

    gloo keeps using the descriptor, so it is replaced by one of the null device: the kernel then closes the socket and
    removes it from the epoll instance of gloo's thread. Only sockets in an epoll instance are closed; NCCL's listening
    sockets are in none.
    """
    for descriptor in _watched_descriptors():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as handle:
            if handle.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                nothing = os.open(os.devnull, os.O_RDWR)
                os.dup2(nothing, descriptor, inheritable=False)
                os.close(nothing)


def _watched_descriptors() -> set[int]:
    """Return the descriptors that are registered in an epoll instance of this process."""
    watched = set()
    descriptors = Path("/proc/self/fd")
    for link in descriptors.iterdir() if descriptors.is_dir() else ():
        with contextlib.suppress(OSError):
            if "eventpoll" in os.readlink(link):
                lines = Path("/proc/self/fdinfo", link.name).read_text().splitlines()
                watched |= {int(line.split()[1]) for line in lines if line.startswith("tfd:")}
    return watched
