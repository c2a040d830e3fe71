"""Copies of weights from host memory to a device, at the speed of the bus.

A copy from pageable memory passes through a buffer of the driver, filled by a single thread: 6 GB took 1.3 to 1.5 s on
an H100 host (2026-11-25). Here torch's CPU threads copy the mapped weights into a small ring of pinned memory, from
which the device reads at full speed, while they copy the next piece.

The weights themselves are not pinned. All ranks of a machine map the same files, so there is one copy in host memory.
These mappings are private, or of sealed memory, and pinning makes a copy of their pages: 10.9 GB for each rank, and 9 s
before the first step (1.34 GB took 1.13 s on an H100 host). The ring takes 256 MiB per rank, more than one block of the
transformer. If memory cannot be pinned, the ring is pageable, and the driver copies each piece a second time.
"""

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from ..ranks.devices import Device, Event, host_memory
from .weights import Stored

CHUNK = 32 * 2**20
"""Size in bytes of one buffer of the ring."""
CHUNKS = 8
"""Buffers of the ring. One is filled while the device reads the others."""
ALIGNMENT = 256


class Uploads:
    """Copies weights to a device, in the dtype of the computation, on a stream of their own. One thread at a time."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = Device(device), dtype
        self.stream = self.device.new_stream()
        self.sent: deque[tuple[Tensor, Event]] = deque()
        """Buffers that were filled, the oldest first, each with an event after the last copy from it."""
        self.chunk: Tensor | None = None
        """The buffer that is being filled, up to `used` bytes."""
        self.used = 0

    def moved(self, stored: Stored) -> Tensor:
        """Return the values on the device, for work launched after this call. On the CPU they may stay mapped."""
        return self.unconverted(stored).to(self.device.torch, self.dtype)

    def unconverted(self, stored: Stored) -> Stored:
        """Return the tensor on the device as it is stored, for work launched after this call."""
        source = stored.tensor
        if source.device == self.device.torch:
            return stored
        place = torch.empty(source.shape, dtype=source.dtype, device=self.device.torch)
        self.device.wait(self.copy([(Stored(source), place)], self.device.mark()))
        return stored._replace(tensor=place)

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
