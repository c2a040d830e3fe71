"""Copies of weights from host memory to a device, at the speed of the bus.

A copy from pageable memory passes through a buffer of the driver, filled by a single thread: 6 GB took 1.3 to 1.5 s on
an H100 host (2026-11-25). Here torch's CPU threads copy the mapped weights into a small ring of pinned memory, from
which the device reads at full speed, while they copy the next piece. A thread drives them, so that the caller can
prepare the next weights, merge patches or build the model meanwhile.

The weights themselves are not pinned. All ranks of a machine map the same files, so there is one copy in host memory.
These mappings are private, or of sealed memory, and pinning makes a copy of their pages: 10.9 GB for each rank, and 9 s
before the first step (1.34 GB took 1.13 s on an H100 host). The ring takes 256 MiB per rank, more than one block of the
transformer. If memory cannot be pinned, the ring is pageable, and the driver copies each piece a second time.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from ..ranks.devices import Device, Event, host_memory
from .weights import Stored

CHUNK = 32 * 2**20
"""Size in bytes of one buffer of the ring."""
CHUNKS = 8
"""Buffers of the ring. One is filled while the device reads the others."""
ALIGNMENT = 256
BATCH = 64 * 2**20
"""Bytes of weights for which the thread enters the stream once."""


class Uploads:
    """Copies weights to a device, in the dtype of the computation, on a stream and in a thread of their own."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = Device(device), dtype
        self.stream = self.device.new_stream()
        self.thread = ThreadPoolExecutor(1, "weights")
        self.sent: deque[tuple[Tensor, Event]] = deque()
        """Buffers that were filled, the oldest first, each with an event after the last copy from it."""
        self.chunk: Tensor | None = None
        """The buffer that is being filled, up to `used` bytes."""
        self.used = 0

    def moved(self, stored: Stored) -> Tensor:
        """Return the values on the device, for work launched after this call. On the CPU they may stay mapped."""
        with self.transfer() as transfer:
            return transfer.add(stored)

    @contextlib.contextmanager
    def transfer(self, check: Callable[[], None] = lambda: None) -> Generator["Transfer", None, None]:
        """Return a context for copies that run while the caller prepares others. Its end waits for their launch.

        check: called in the thread before each copy. An exception from it or from a copy ends the transfer, and the
        context raises it. After any exception no copy is in flight.
        """
        transfer = Transfer(self, check)
        try:
            yield transfer
            transfer.finish()
        finally:
            self.settle(transfer.started)

    def start(self, weights: Iterable[tuple[Stored, Tensor]]) -> Future[Event]:
        """Do `copy` in the thread, after all work that was launched so far on this thread's stream."""
        return self.thread.submit(self.copy, weights, self.device.mark())

    def settle(self, started: Collection[Future[Event]]) -> None:
        """Drop what `start` has not begun, and wait until the rest is launched.

        The places of the copies may be freed then: work launched after this call follows the copies.
        """
        for copied in started:
            copied.cancel()
        wait(started)
        self.device.wait(self.mark())

    @torch.inference_mode()  # the ring is made here, in a step or in a thread beside it, and written in both
    def copy(self, weights: Iterable[tuple[Stored, Tensor]], after: Event) -> Event:
        """Copy values to their places on the device, once the event `after` has occurred.

        The places are contiguous. Returns an event at the end of the copies when these are launched, not when they
        end. Weights of another dtype, or with a scale, are converted on the device.
        """
        with self.device.on(self.stream):
            self.device.wait(after)
            for stored, place in weights:
                if stored.tensor.dtype == place.dtype and stored.scale is None:
                    self._send(stored.tensor, place)
                    continue
                raw = torch.empty(stored.tensor.shape, dtype=stored.tensor.dtype, device=place.device)
                self._send(stored.tensor, raw)
                place.copy_(stored._replace(tensor=raw).to(place.device, place.dtype))
            return self.device.mark()

    def mark(self) -> Event:
        """Return an event after all copies that were launched so far."""
        with self.device.on(self.stream):
            return self.device.mark()

    def _send(self, source: Tensor, place: Tensor) -> None:
        """Copy a tensor on the host to a place of the same dtype, piece by piece."""
        pieces = (part.detach().reshape(-1).view(torch.uint8).split(CHUNK) for part in (source, place))
        for piece, target in zip(*pieces, strict=True):
            staged = self._room(piece.numel())
            staged.copy_(piece)
            target.copy_(staged, non_blocking=True)

    def _room(self, nbytes: int) -> Tensor:
        """Return `nbytes` of the ring that the device has finished reading."""
        if self.chunk is None or self.used + nbytes > CHUNK:
            if self.chunk is not None:
                self.sent.append((self.chunk, self.device.mark()))
            if len(self.sent) < CHUNKS:
                self.chunk = host_memory(CHUNK, torch.uint8)
            else:
                self.chunk, read = self.sent.popleft()
                read.synchronize()
            self.used = 0
        room = self.chunk[self.used : self.used + nbytes]
        self.used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return room


class Transfer:
    """Copies of one load, from `Uploads.transfer`."""

    def __init__(self, uploads: Uploads, check: Callable[[], None]) -> None:
        self.uploads, self.check = uploads, check
        self.started: list[Future[Event]] = []
        self.batch: list[tuple[Stored, Tensor]] = []
        """Copies that are not started yet, with places of `waiting` bytes."""
        self.waiting = 0

    def add(self, stored: Stored) -> Tensor:
        """Return a tensor on the device that has the values at the end of the context. On the CPU they may be mapped.

        Values that are on the device already are converted at once.
        """
        device, dtype = self.uploads.device.torch, self.uploads.dtype
        if stored.tensor.device == device:
            return stored.to(device, dtype)
        place = torch.empty(stored.tensor.shape, dtype=dtype, device=device)
        self.batch.append((stored, place))
        self.waiting += place.nbytes
        if self.waiting >= BATCH:
            self._start_batch()
        return place

    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        """Start to copy tensors as they are. The result waits and returns the copies, for work launched after it."""
        device = self.uploads.device
        if all(tensor.device == device.torch for tensor in tensors):
            return lambda: tensors
        places = [torch.empty(tensor.shape, dtype=tensor.dtype, device=device.torch) for tensor in tensors]
        copied = self._start(zip(map(Stored, tensors), places, strict=True))

        def result() -> list[Tensor]:
            device.wait(copied.result())
            return places

        return result

    def finish(self) -> None:
        """Start what is not started yet, and wait until all copies are launched. Raises what a copy raised."""
        self._start_batch()
        for copied in self.started:
            copied.result()

    def _start_batch(self) -> None:
        if self.batch:
            self._start(self.batch)
            self.batch, self.waiting = [], 0

    def _start(self, weights: Iterable[tuple[Stored, Tensor]]) -> Future[Event]:
        self.started.append(self.uploads.start(self._checked(weights)))
        return self.started[-1]

    def _checked(self, weights: Iterable[tuple[Stored, Tensor]]) -> Iterator[tuple[Stored, Tensor]]:
        for pair in weights:
            self.check()
            yield pair
