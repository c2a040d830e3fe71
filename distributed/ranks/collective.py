"""What ranks agree on: collectives of the world, small and on the CPU, that keep all ranks at the same place."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from ..errors import Cancelled
from .peers import new_group

T = TypeVar("T")

_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
"""Process groups by their ranks. A process keeps them until it ends."""


class Watch(Protocol):
    """What a task reports to while it runs. Both methods may be called from any thread."""

    def progress(self, done: int, total: int) -> None: ...

    def cancelled(self) -> bool: ...


def agree(value: int, operation: dist.ReduceOp = dist.ReduceOp.MAX) -> int:
    """Return the largest value of all ranks, or what `operation` makes of the values. A collective of the world."""
    if not dist.is_initialized():
        return int(value)
    tensor = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(tensor, operation)
    return int(tensor)


def all_or_none(prepare: Callable[[], T]) -> T:
    """Return what `prepare` returns, if it succeeds on every rank. A collective of the world.

    Where it fails on some ranks, those raise their own exception and all others raise Cancelled.
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
