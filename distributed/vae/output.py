"""Copies of finished pixels from a device to the shared frame buffer.

On an accelerator a separate stream copies the pixels into pinned memory, and a thread copies them from there into the
buffer, so neither delays the decoder. Pinned memory is slow to allocate (1.34 GB took 1.13 s on an H100 host,
2026-11-23), so the writer keeps it for its lifetime. The number of slots limits how far the decoder's launches can run
ahead, and so how many pieces of finished pixels are on the device.
"""

import queue
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ..ranks.devices import Device, host_memory

SLOTS = 4
"""Number of pieces in flight at once."""


class PixelWriter:
    """Copies pixels into views of a CPU tensor, in order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.direct = not Device(device).has_streams
        self.error: Exception | None = None
        if not self.direct:
            self.accelerator = Device(device).module
            self.stream = self.accelerator.Stream(device)
            self.free: queue.Queue[Tensor | None] = queue.Queue()
            for _ in range(SLOTS):
                self.free.put(None)
            self.ready: queue.Queue = queue.Queue()
            self.thread = threading.Thread(target=self._copy_staged, name="pixel-writer", daemon=True)
            self.thread.start()

    def write(self, pixels: Tensor, place: Tensor, written: Callable[[], None]) -> None:
        """Copy `pixels` into `place`, a CPU view of the same shape, then call `written`, possibly in another thread."""
        if self.direct:
            place.copy_(pixels)
            written()
            return
        self._check()
        slot = self.free.get()
        if slot is None or slot.numel() < pixels.numel():
            try:
                slot = host_memory(pixels.numel(), torch.float32)
            except BaseException:
                self.free.put(slot)
                raise
        staged = slot[: pixels.numel()].view(pixels.shape)
        self.stream.wait_stream(self.accelerator.current_stream(self.device))
        with self.accelerator.stream(self.stream):
            staged.copy_(pixels, non_blocking=True)
            pixels.record_stream(self.stream)
            done = self.stream.record_event()
        self.ready.put((slot, staged, done, place, written))

    def flush(self) -> None:
        """Wait until all pixels passed to `write` so far are copied."""
        if not self.direct:
            self.ready.join()
            self._check()

    def close(self) -> None:
        """Stop the thread. The writer cannot be used afterwards."""
        if not self.direct:
            self.ready.put(None)
            self.thread.join()

    def _check(self) -> None:
        if self.error:
            error, self.error = self.error, None
            raise RuntimeError("Finished pixels could not be copied to the shared frames.") from error

    @torch.inference_mode()  # inference tensors, as the decoder's views are, cannot be written outside of it
    def _copy_staged(self) -> None:
        while (item := self.ready.get()) is not None:
            slot, staged, done, place, written = item
            try:
                done.synchronize()
                place.copy_(staged)
                written()
            except Exception as error:  # raised by the next `write` or `flush`, so that they do not hang
                self.error = error
            finally:
                self.free.put(slot)
                self.ready.task_done()
