"""The order of copies and computation on an accelerator, whose streams run independently unless one waits."""

import contextlib
import threading
from collections import Counter

import pytest
import torch

from distributed.denoise.placement import SLOTS, Placement
from distributed.denoise.stream import BlockStream
from distributed.denoise.upload import Uploads
from distributed.denoise.weights import Stored

LAYERS = 6


class Ordered:
    """A device with two streams that only have an order. An event knows the work that is done when it occurs."""

    torch = torch.device("cpu")

    def __init__(self) -> None:
        self.known = {"computation": Counter(), "copies": Counter()}
        """For each stream, how much work of each stream is done when it starts its next work."""
        self.thread = threading.local()

    @property
    def current(self) -> str:
        return getattr(self.thread, "stream", "computation")

    def new_stream(self) -> str:
        return "copies"

    @contextlib.contextmanager
    def on(self, stream: str):
        before, self.thread.stream = self.current, stream
        yield
        self.thread.stream = before

    def mark(self) -> Counter:
        return Counter(self.known[self.current])

    def wait(self, event: Counter) -> None:
        self.known[self.current] |= event

    def launch(self) -> Counter:
        """Launch work on the current stream, and return what must be known of it by work that comes after it."""
        self.known[self.current][self.current] += 1
        return Counter({self.current: self.known[self.current][self.current]})

    def is_after(self, work: Counter) -> bool:
        return work <= self.known[self.current]


class OrderedUploads(Uploads):
    """Checks that no copy to a slot can overtake the computation with what was there before."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), torch.float32)
        self.device = Ordered()
        self.stream = self.device.new_stream()
        self.copied: dict[int, Counter] = {}
        self.computed: dict[int, Counter] = {}

    def _send(self, source, place) -> None:
        assert self.device.is_after(self.computed.get(place.data_ptr(), Counter())), "a slot is filled too early"
        self.copied[place.data_ptr()] = self.device.launch()

    def compute(self, module: torch.nn.Module) -> None:
        place = module.weight.data_ptr()
        if place in self.copied:
            assert self.device.is_after(self.copied[place]), "a block computes before its weights are there"
        self.computed[place] = self.device.launch()


def ordered_stream(streamed: tuple[int, ...]) -> tuple[BlockStream, OrderedUploads]:
    with torch.device("meta"):
        blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(LAYERS))
    for i in set(range(LAYERS)) - set(streamed):
        blocks[i] = torch.nn.Linear(2, 2, bias=False)
    uploads = OrderedUploads()
    weights = {i: {"weight": Stored(torch.zeros(2, 2))} for i in streamed}
    return BlockStream(blocks, weights, uploads), uploads


def compute(blocks: BlockStream, uploads: OrderedUploads, until: int = LAYERS) -> int:
    """Compute blocks, end the forward early if `until` says so, and return how many were computed."""
    done = 0
    with contextlib.closing(blocks()) as modules:
        for module in modules:
            uploads.compute(module)
            done += 1
            if done == until:
                break
    assert all(map(uploads.device.is_after, uploads.copied.values())), "a copy is in flight after the forward"
    return done


@pytest.mark.parametrize(
    "streamed", [Placement(False, resident, LAYERS).streamed for resident in range(LAYERS - SLOTS)], ids=str
)
def test_streams_wait_for_each_other(streamed):
    blocks, uploads = ordered_stream(streamed)
    for until in (LAYERS, *range(1, LAYERS + 1), LAYERS):
        assert compute(blocks, uploads, until) == until
    assert len(uploads.copied) == SLOTS


@pytest.mark.parametrize("stream", ["computation", "copies"])
def test_a_stream_that_did_not_wait_would_be_noticed(stream, monkeypatch):
    blocks, uploads = ordered_stream(tuple(range(LAYERS)))
    wait = uploads.device.wait

    def wait_on_the_other(event: Counter) -> None:
        if uploads.device.current != stream:
            wait(event)

    monkeypatch.setattr(uploads.device, "wait", wait_on_the_other)
    with pytest.raises(AssertionError, match=r"too early|before its weights"):
        compute(blocks, uploads)
