"""Copies of weights through the ring of host memory."""

import threading
from typing import ClassVar

import pytest
import torch

from distributed.denoise import upload
from distributed.denoise.upload import ALIGNMENT, Uploads
from distributed.denoise.weights import Stored
from distributed.ranks.devices import Device

CPU = torch.device("cpu")
BESIDE = torch.device("cpu:0")
"""A device to which weights are copied, because tensors on the CPU are on `CPU`."""


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def copied(uploads: Uploads, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    place = torch.full(stored.tensor.shape, torch.nan, dtype=dtype)
    uploads.copy([(stored, place)], Device(CPU).mark()).synchronize()
    return place


@pytest.fixture
def small_ring(monkeypatch):
    """A ring of three buffers of 4 KiB. Records the sizes of the buffers that were made."""
    made, make = [], upload.host_memory

    def record(count, dtype):
        made.append(count)
        return make(count, dtype)

    monkeypatch.setattr(upload, "host_memory", record)
    monkeypatch.setattr(upload, "CHUNK", 4096)
    monkeypatch.setattr(upload, "CHUNKS", 3)
    return made


@pytest.mark.parametrize("numbers", [0, 1, 7, 1023, 1024, 1025, 40_000])
def test_copies_of_any_size_keep_their_values(small_ring, numbers):
    uploads = Uploads(CPU, torch.float32)
    for shape in ((numbers,), (3, numbers), (numbers, 1, 1)):
        value = draw(*shape)
        assert torch.equal(copied(uploads, Stored(value), torch.float32), value)
    assert len(small_ring) <= 3 and set(small_ring) <= {4096}


def test_a_step_and_a_thread_beside_it_can_use_the_same_buffers():
    """Tensors that are made in inference mode, as in a step, cannot be written outside of it."""
    uploads, value = Uploads(CPU, torch.float32), draw(100)
    with torch.inference_mode():
        assert torch.equal(copied(uploads, Stored(value), torch.float32), value)
    assert torch.equal(copied(uploads, Stored(2 * value), torch.float32), 2 * value)


def test_small_weights_share_a_buffer(small_ring):
    uploads = Uploads(CPU, torch.float32)
    values = [draw(n) for n in range(1, 1 + 4096 // ALIGNMENT)]
    places = [torch.zeros_like(value) for value in values]
    uploads.copy(zip(map(Stored, values), places, strict=True), uploads.mark())
    assert all(torch.equal(*pair) for pair in zip(places, values, strict=True)) and len(small_ring) == 1
    copied(uploads, Stored(draw(1)), torch.float32)
    assert len(small_ring) == 2


class Late(Device):
    """A device whose copies run when an event after them is waited for."""

    pending: ClassVar[list] = []

    def mark(self):
        end = len(self.pending)

        class Mark:
            def synchronize(mark) -> None:
                Late.run(end)

        return Mark()

    @classmethod
    def run(cls, end: int) -> None:
        """Run the copies up to this one that have not run."""
        for i, copy in enumerate(cls.pending[:end]):
            if copy is not None:
                copy()
                cls.pending[i] = None


@pytest.mark.parametrize("waits", [True, False])
@torch.inference_mode()
def test_a_buffer_is_filled_again_when_the_device_has_read_it(small_ring, monkeypatch, waits):
    uploads, copy = Uploads(CPU, torch.float32), torch.Tensor.copy_
    monkeypatch.setattr(Late, "pending", [])
    uploads.device = Late(CPU)

    def copy_late(place, source, non_blocking=False):
        if non_blocking:
            Late.pending.append(lambda: copy(place, source))
            return place
        return copy(place, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_late)
    if not waits:
        monkeypatch.setattr(Late, "run", lambda end: None)
    values = [draw(n) for n in (3000, 7, 500, 2000, 20_000)]
    places = [torch.zeros_like(value) for value in values]
    uploads.copy(zip(map(Stored, values), places, strict=True), uploads.device.mark())
    assert any(copy is None for copy in Late.pending) == waits
    for late in filter(None, Late.pending):
        late()
    assert all(torch.equal(*pair) for pair in zip(places, values, strict=True)) == waits
    assert len(small_ring) == 3


def test_a_part_of_a_tensor_is_copied_without_the_rest():
    whole = draw(9, 5)
    for part in whole.chunk(3):
        assert torch.equal(copied(Uploads(CPU, torch.float32), Stored(part), torch.float32), part)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.37), torch.tensor([1.7])])
def test_values_are_converted_as_without_the_ring(small_ring, stored, scale):
    value = Stored(draw(70, 50).to(stored), scale)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(copied(Uploads(CPU, dtype), value, dtype), value.to(CPU, dtype))


def test_weights_stay_mapped_on_the_cpu():
    value = draw(5)
    assert Uploads(CPU, torch.float32).moved(Stored(value)) is value
    assert torch.equal(Uploads(CPU, torch.float16).moved(Stored(value)), value.half())


@pytest.mark.parametrize("batch", [0, 5000, 2**40])
def test_weights_of_a_transfer_are_there_at_its_end(small_ring, monkeypatch, batch):
    monkeypatch.setattr(upload, "BATCH", batch)
    uploads = Uploads(BESIDE, torch.float32)
    values = [Stored(draw(n)) for n in (3000, 7, 0, 500)]
    values += [Stored(draw(70).bfloat16()), Stored(draw(70).to(torch.float8_e4m3fn), torch.tensor(0.37))]
    with uploads.transfer() as transfer:
        found = [transfer.add(stored) for stored in values]
    for place, stored in zip(found, values, strict=True):
        assert torch.equal(place, stored.to(CPU, torch.float32))
        assert stored.tensor.numel() == 0 or place.data_ptr() != stored.tensor.data_ptr()


def test_the_caller_goes_on_while_weights_are_copied(monkeypatch):
    monkeypatch.setattr(upload, "BATCH", 0)
    uploads, value, free = Uploads(BESIDE, torch.float32), draw(100), threading.Event()
    send = uploads._send

    def wait_and_send(source, place):
        assert free.wait(60)
        send(source, place)

    monkeypatch.setattr(uploads, "_send", wait_and_send)
    with uploads.transfer() as transfer:
        found = [transfer.add(Stored(value)) for _ in range(3)]
        free.set()
    assert all(torch.equal(place, value) for place in found)


def test_fetched_tensors_are_copied_as_they_are_before_the_end_of_the_transfer():
    uploads = Uploads(BESIDE, torch.float32)
    values = [draw(5, 3).bfloat16(), draw(7), torch.arange(3)]
    with uploads.transfer() as transfer:
        transfer.add(Stored(draw(2)))
        for place, value in zip(transfer.fetch(values)(), values, strict=True):
            assert place.dtype == value.dtype and torch.equal(place, value) and place.data_ptr() != value.data_ptr()


def test_a_check_that_raises_ends_a_transfer_between_tensors(monkeypatch):
    uploads, checks = Uploads(BESIDE, torch.float32), []

    def check() -> None:
        checks.append(threading.current_thread())
        if len(checks) == 3:
            raise ZeroDivisionError

    sent, send = [], uploads._send
    monkeypatch.setattr(uploads, "_send", lambda *pair: (sent.append(pair), send(*pair)))
    with pytest.raises(ZeroDivisionError), uploads.transfer(check) as transfer:
        for _ in range(9):
            transfer.add(Stored(draw(4)))
    assert len(sent) == 2 and threading.current_thread() not in checks
    assert torch.equal(uploads.moved(Stored(draw(4))), draw(4))


def test_after_an_exception_in_a_transfer_no_copy_is_in_flight(monkeypatch):
    monkeypatch.setattr(upload, "BATCH", 0)
    uploads, begun, free, sent = Uploads(BESIDE, torch.float32), threading.Event(), threading.Event(), []

    def slow(source, place):
        begun.set()
        assert free.wait(60)
        sent.append(place)

    monkeypatch.setattr(uploads, "_send", slow)

    def free_and_wait(copies, wait=upload.wait):
        free.set()
        wait(copies)

    monkeypatch.setattr(upload, "wait", free_and_wait)
    with pytest.raises(ZeroDivisionError), uploads.transfer() as transfer:
        for _ in range(3):
            transfer.add(Stored(draw(4)))
        assert begun.wait(60)
        raise ZeroDivisionError
    assert len(sent) == 1, "the copy in hand did not end, or others began"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_reach_the_gpu(dtype):
    gpu = torch.device("cuda:0")
    uploads = Uploads(gpu, dtype)
    for stored in (
        Stored(draw(6144, 8192).bfloat16()),
        Stored(draw(64, 64).to(torch.float8_e4m3fn), torch.tensor(0.3)),
    ):
        for _ in range(4):
            moved = uploads.moved(stored)
            assert moved.device == gpu and torch.equal(moved, stored.to(gpu, dtype))
