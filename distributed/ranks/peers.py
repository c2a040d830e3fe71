"""Connections between ranks that are certain to lead to ranks.

gloo listens on a loopback port while a process group is created, and takes whoever connects first for the peer. Every
account of the machine can connect. So the ranks of a new group first wait for each other, which leaves strangers
little time. Then each proves to each other one that it knows the group's key, which only the owner of the private
folder can read. Where one cannot, a stranger is connected in its place, and no rank goes on. What gloo listens on is
closed afterwards: nobody can connect to a rank that is up, or fill it with connections.
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

from .devices import Device
from .environment import RankEnvironment

PROOF_SECONDS = 10
"""How long a rank may take to prove itself once it is connected."""
FOREVER = datetime.timedelta(days=1)
"""Ranks that hang are noticed by their lack of progress, not by a fixed time."""


def connect_world(started: RankEnvironment, device: Device) -> None:
    """Initialise torch.distributed with the group's other ranks. A collective.

    Raises ConnectionError where another program connected in place of a rank, and RuntimeError where it also wrote.
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
    """Create a process group of some ranks. A collective of the world; raises as `connect_world` does."""
    dist.all_reduce(torch.zeros(1))  # all are here, and connect in the next moment
    group = dist.new_group(ranks)
    close_listeners()
    if dist.get_rank() in ranks:
        _prove(RankEnvironment.from_env(), ranks, group)
    return group


def _prove(started: RankEnvironment, ranks: Sequence[int], group: dist.ProcessGroup | None) -> None:
    """Exchange proofs with every other rank of a process group. Raises ConnectionError for those that have none."""
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
            raise ConnectionError(f"Rank {other} did not prove itself: {error}") from error
    for other in others:
        if not hmac.compare_digest(bytes(received[other].tolist()), proof(other, here)):
            raise ConnectionError(f"Another program is connected in place of rank {other}.")


def close_listeners() -> None:
    """Close the sockets that gloo listens on, which it needs only while it creates a process group. On Linux.

    gloo keeps the descriptor, so another file takes the socket's place: the kernel then ends the socket, and removes it
    from what gloo's thread waits for. Those are known by that thread's epoll instance; NCCL's are in none.
    """
    for descriptor in _watched_descriptors():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as handle:
            if handle.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                nothing = os.open(os.devnull, os.O_RDWR)
                os.dup2(nothing, descriptor, inheritable=False)
                os.close(nothing)


def _watched_descriptors() -> set[int]:
    """Descriptors that some epoll instance of this process waits for."""
    watched = set()
    descriptors = Path("/proc/self/fd")
    for link in descriptors.iterdir() if descriptors.is_dir() else ():
        with contextlib.suppress(OSError):
            if "eventpoll" in os.readlink(link):
                lines = Path("/proc/self/fdinfo", link.name).read_text().splitlines()
                watched |= {int(line.split()[1]) for line in lines if line.startswith("tfd:")}
    return watched
