"""The pixel writer with a fake accelerator, whose copies finish when the test sets an event."""

import contextlib
import threading

import pytest
import torch

from distributed.ranks.devices import Device
from distributed.vae import output
from distributed.vae.output import SLOTS, PixelWriter


class Event:
    """The event of a copy that finishes when `released` is set."""

    def __init__(self, released: threading.Event) -> None:
        self.released = released

    def synchronize(self) -> None:
        assert self.released.wait(10)


class Accelerator:
    """The functions of a device module that the writer uses, on the CPU."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.released.set()

    def Stream(self, device: torch.device) -> "Accelerator":
        return self

    def current_stream(self, device: torch.device) -> "Accelerator":
        return self

    def stream(self, stream: "Accelerator") -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def wait_stream(self, other: "Accelerator") -> None: ...

    def record_event(self) -> Event:
        return Event(self.released)


@pytest.fixture
def accelerator(monkeypatch):
    found = Accelerator()
    monkeypatch.setattr(Device, "has_streams", property(lambda self: True))
    monkeypatch.setattr(Device, "module", property(lambda self: found))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(output, "host_memory", lambda count, dtype: torch.empty(count, dtype=dtype))
    return found


@pytest.fixture
def writer(accelerator):
    writer = PixelWriter(torch.device("cpu"))
    yield writer
    writer.close()
    assert not writer.thread.is_alive()


def pieces(count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    return [torch.full((2, 3, 4, 3), float(i)) for i in range(count)], torch.full((2 * count, 3, 4, 3), -1.0)


def test_pieces_are_written_in_order_and_each_is_reported(writer):
    given, place = pieces(3 * SLOTS)
    written = []
    for i, piece in enumerate(given):
        writer.write(piece, place[2 * i : 2 * i + 2], lambda i=i: written.append(i))
    writer.flush()
    assert torch.equal(place, torch.cat(given)) and written == list(range(len(given)))


def test_the_decoder_blocks_while_no_slot_is_free(accelerator, writer):
    given, place = pieces(SLOTS + 1)
    accelerator.released.clear()

    def write() -> None:
        for i, piece in enumerate(given):
            writer.write(piece, place[2 * i : 2 * i + 2], lambda: None)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()  # no slot is free
    accelerator.released.set()
    thread.join(10)
    writer.flush()
    assert not thread.is_alive() and torch.equal(place, torch.cat(given))


@pytest.mark.parametrize("found", ["flush", "write"])
def test_an_error_in_the_copying_thread_is_raised_once_and_the_writer_stays_usable(writer, found):
    given, place = pieces(2)

    def fail() -> None:
        raise OSError("the frames are gone")

    writer.write(given[0], place[:2], fail)
    writer.ready.join()
    with pytest.raises(RuntimeError, match="shared frames") as error:
        writer.flush() if found == "flush" else writer.write(given[1], place[2:], lambda: None)
    assert isinstance(error.value.__cause__, OSError)
    for i in range(2 * SLOTS):  # the slot of the piece that failed is free again
        writer.write(given[i % 2], place[:2], lambda: None)
    writer.flush()
    assert torch.equal(place[:2], given[1])


def test_a_piece_of_the_wrong_shape_raises_and_does_not_block(writer):
    given, place = pieces(1)
    writer.write(given[0], place[:, :1], lambda: None)
    with pytest.raises(RuntimeError, match="shared frames"):
        writer.flush()


def test_a_slot_stays_usable_after_host_memory_runs_out(writer, monkeypatch):
    given, place = pieces(1)

    def fail(count, dtype):
        raise MemoryError("no host memory")

    with monkeypatch.context() as patch:
        patch.setattr(output, "host_memory", fail)
        for _ in range(SLOTS + 1):
            with pytest.raises(MemoryError):
                writer.write(given[0], place, lambda: None)
    writer.write(given[0], place, lambda: None)
    writer.flush()
    assert torch.equal(place, given[0])
