"""Collectives on small CPU tensors, by which all ranks agree on a value or on an error, and process groups."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from ..errors import Cancelled
from .devices import Device
from .peers import new_group

T = TypeVar("T")

_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
"""Process groups by their ranks. A process keeps them until it ends."""


class Watch(Protocol):
    """Interface for a running task to report progress and check for cancellation. Both methods are thread-safe."""

    def progress(self, done: int, total: int) -> None: ...

    def cancelled(self) -> bool: ...


def agree(value: int, operation: dist.ReduceOp = dist.ReduceOp.MAX) -> int:
    """Return the maximum of the ranks' values, or the result of another reduction. A collective of all ranks."""
    if not dist.is_initialized():
        return int(value)
    tensor = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(tensor, operation)
    return int(tensor)


def reserve(device: Device, nbytes: int) -> bool:
    """Reserve memory of each rank's device. Return False on all ranks if it fails on any. A collective of the world."""
    failed = False
    try:
        device.reserve(nbytes)
    except torch.OutOfMemoryError:
        failed = True
    return not agree(failed)


def all_or_none(prepare: Callable[[], T]) -> T:
    """Return the result of `prepare`, if it succeeds on every rank. A collective of all ranks.

    If it fails on some ranks, these ranks raise their own exception and all others raise Cancelled.
    """
    problem = None
    try:
        result = prepare()
    except Exception as error:
        problem = error
    failed = agree(problem is not None)
    if problem:
        raise problem
    if failed:
        raise Cancelled
    return result


def first_ranks(size: int) -> dist.ProcessGroup | None:
    """Return the process group of the first `size` ranks; see `group_of`."""
    return group_of(range(size))


def group_of(ranks: Sequence[int]) -> dist.ProcessGroup | None:
    """Return the process group of these ranks; None for one rank. The first call is a collective of the world."""
    if len(ranks) == 1:
        return None
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    key = tuple(ranks)
    if key not in _groups:
        _groups[key] = new_group(key)
    return _groups[key]
