"""Device memory into which the other ranks of a process group write: an exchange without a collective.

GPUs of one host can write into each other's memory (torch.distributed's symmetric memory). The copy engines do that
while all multiprocessors compute. A collective of NCCL is a kernel: it waits until multiprocessors are free, so that it
hides little of its time behind matrix products. On two H200 (2026-11-28) an all-to-all at 480x848x33 took 117
microseconds, and a copy of the same data with a barrier 82.
"""

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..ranks.collective import agree, all_or_none
from ..ranks.devices import Device, Event

log = logging.getLogger(__name__)

BARRIER_BYTES = 2**20
"""Device memory that a window takes beside its buffer, for barriers."""


class Window:
    """One buffer of each rank of a group. What a rank sends can be read after `complete`, which all ranks call.

    buffers: of the ranks in the order of the group, 1-D, of one size and dtype. index: of this rank. barrier: launches
    a barrier of the group on this thread's stream.
    """

    def __init__(self, buffers: Sequence[Tensor], index: int, barrier: Callable[[], object]) -> None:
        self.buffers, self.index, self._barrier = buffers, index, barrier
        self._device = Device(buffers[index].device)
        self._stream = self._device.new_stream()
        self._sources: list[Tensor] = []
        """What is being sent. It must not be overwritten before `complete`."""
        self._read: Event | None = None
        """When this rank has read what it received, if the others must wait for that before they send more."""

    @property
    def own(self) -> Tensor:
        """This rank's buffer."""
        return self.buffers[self.index]

    @property
    def nbytes(self) -> int:
        """Device memory of this rank's buffer."""
        return self.own.nbytes

    def send(self, source: Tensor, parts: Iterable[tuple[int, int, Tensor]]) -> None:
        """Copy parts of a tensor to buffers, after the work that was launched so far.

        parts: for each its rank, the first element in that rank's buffer, and the contiguous part.
        """
        computed = self._device.mark()
        with self._device.on(self._stream):
            if self._read is not None:
                self._device.wait(self._read)
                self._barrier()
                self._read = None
            self._device.wait(computed)
            for rank, start, part in parts:
                self.buffers[rank][start : start + part.numel()].copy_(part.view(-1), non_blocking=True)
        self._sources.append(source)

    def complete(self) -> None:
        """Let work that is launched from now on read what all ranks have sent. A collective, if this rank has sent."""
        if not self._sources:
            return
        with self._device.on(self._stream):
            self._barrier()
            arrived = self._device.mark()
        self._device.wait(arrived)
        self._sources.clear()

    def release(self) -> None:
        """Let no rank send more before all ranks have done the work that was launched so far.

        All ranks call it, and all send next: that is a collective then.
        """
        self._read = self._device.mark()


class Windows:
    """The window of this rank, opened when a forward first needs it, and kept until another one is needed.

    Without support by PyTorch and the devices there is none.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = Device(device)
        self._window: tuple[tuple[int, ...], Window] | None = None
        self._reachable: dict[tuple[int, ...], bool] = {}

    @property
    def nbytes(self) -> int:
        """Device memory of the window."""
        return self._window[1].nbytes if self._window else 0

    def close(self) -> None:
        """Free the window."""
        self._window = None

    def of_group(
        self, ranks: tuple[int, ...], group: dist.ProcessGroup | None, elements: int, dtype: torch.dtype
    ) -> Window | None:
        """Return the window of a group, with at least this many elements. A collective of the world.

        group: None for a single rank. Raises torch.OutOfMemoryError, and Cancelled if another rank raises it.
        """
        if not self.device.has_symmetric_memory:  # the same on all ranks
            return None
        if group is not None and ranks not in self._reachable:
            self._reachable[ranks] = _can_reach(group, self.device)
        wanted = group is not None and self._reachable[ranks]
        fits = not wanted or (self._window is not None and self._fits(ranks, elements, dtype))
        if agree(not fits):
            self.close()
            self.device.empty_cache()
            buffer = all_or_none(lambda: _allocate(elements, dtype, self.device) if wanted else None)
            window = _open(buffer, group) if wanted else None
            if agree(wanted and window is None):
                log.warning("The ranks cannot write into each other's memory. They use collectives.")
                self._reachable[ranks] = wanted = False
            self._window = (ranks, window) if wanted else None
        return self._window[1] if wanted else None

    def _fits(self, ranks: tuple[int, ...], elements: int, dtype: torch.dtype) -> bool:
        of, window = self._window
        return of == ranks and window.own.dtype == dtype and len(window.own) >= elements


def _can_reach(group: dist.ProcessGroup, device: Device) -> bool:
    """Return whether the ranks of a group can write into each other's memory. A collective of the group."""
    indices = [torch.tensor(0) for _ in range(group.size())]
    dist.all_gather(indices, torch.tensor(device.torch.index), group=group)
    verdict = torch.tensor(int(all(device.reaches(int(index)) for index in indices)))
    dist.all_reduce(verdict, dist.ReduceOp.MIN, group=group)
    return bool(verdict)


def _allocate(elements: int, dtype: torch.dtype, device: Device) -> Tensor:
    """Allocate the buffer of this rank. Raises torch.OutOfMemoryError."""
    from torch.distributed import _symmetric_memory

    (free, _), needed = device.module.mem_get_info(device.torch), elements * dtype.itemsize + BARRIER_BYTES
    if needed > free:
        raise torch.OutOfMemoryError(f"Exchanges need {needed} bytes of {device.torch}; {free} are free.")
    return _symmetric_memory.empty(elements, dtype=dtype, device=device.torch)


def _open(buffer: Tensor, group: dist.ProcessGroup) -> Window | None:
    """Return a window of the buffers of all ranks, which have the same size, or None if the system refuses it.

    A collective of the group.
    """
    from torch.distributed import _symmetric_memory

    try:
        memory, own = _symmetric_memory.rendezvous(buffer, group), group.rank()
    except RuntimeError as error:
        log.warning("%s", error)
        return None
    buffers = [
        buffer if rank == own else memory.get_buffer(rank, tuple(buffer.shape), buffer.dtype)
        for rank in range(group.size())
    ]
    return Window(buffers, own, memory.barrier)
