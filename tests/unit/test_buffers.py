"""Shared memory: which processes can open it, how it is protected, and when it is refused, reused and freed."""

import gc
import mmap
import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from distributed.ranks import buffers, memory, shared_memory
from distributed.ranks.buffers import SharedBuffers, open_tensor
from distributed.ranks.shared_memory import SharedMemory, open_shared

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a buffer is a file")
SHAPE = (1, 5, 16, 32, 3)


@pytest.fixture
def pool():
    pool = SharedBuffers()
    yield pool
    gc.collect()
    pool.trim()


def test_the_controller_reads_what_a_rank_writes(pool):
    frames, place = pool.allocate(SHAPE)
    open_tensor(place).fill_(0.5)
    assert (frames == 0.5).all() and frames.shape == SHAPE


def test_a_buffer_is_reused_when_no_tensor_refers_to_it(pool):
    frames, place = pool.allocate(SHAPE)
    view = frames[0, 1:]
    del frames
    gc.collect()
    assert pool.lent == 1
    del view
    gc.collect()
    assert pool.lent == 0
    assert pool.allocate(SHAPE)[1] == place
    gc.collect()
    _, other = pool.allocate((1, 1, 16, 32, 3))
    assert other != place, "a buffer more than twice as large as needed was reused"


def test_a_buffer_in_use_when_the_pool_is_trimmed_is_freed_when_it_is_returned(pool):
    frames, place = pool.allocate(SHAPE)
    pool.trim()
    assert open_tensor(place).sum() == 0
    del frames
    gc.collect()
    with pytest.raises(OSError):
        open_tensor(place)


def test_a_buffer_cannot_be_resized_or_sealed_by_a_rank(pool):
    frames, place = pool.allocate(SHAPE)
    descriptor = open_shared(place.place)
    try:
        for size in (0, frames.nbytes * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
        with pytest.raises(PermissionError):
            shared_memory.fcntl.fcntl(descriptor, shared_memory.fcntl.F_ADD_SEALS, shared_memory.fcntl.F_SEAL_WRITE)
    finally:
        os.close(descriptor)
    assert frames.sum() == 0


def test_read_only_memory_cannot_be_written_by_any_process():
    shared = SharedMemory("hv15-test", 4096)
    try:
        os.pwrite(shared.descriptor, b"first", 0)
        shared.offer(read_only=True)
        descriptor = open_shared(shared.place)
        try:
            assert os.pread(descriptor, 5, 0) == b"first"
            with pytest.raises(PermissionError):
                os.pwrite(descriptor, b"other", 0)
            with pytest.raises(PermissionError):
                mmap.mmap(descriptor, 4096)
        finally:
            os.close(descriptor)
    finally:
        shared.close()


def test_frames_larger_than_the_available_memory_are_refused_before_they_are_allocated(pool):
    with pytest.raises(MemoryError, match=r"^12288\.00 GiB of memory is needed; \d+\.\d\d GiB is available \(the "):
        pool.allocate((1, 2**20, 2**10, 2**10, 3))
    assert not pool.lent


def test_unused_buffers_are_freed_if_larger_frames_need_the_memory(pool, monkeypatch):
    frames, place = pool.allocate(SHAPE)
    size = frames.nbytes
    del frames
    gc.collect()

    def available() -> int:
        return size if pool._free else 2 * size  # the unused buffer occupies `size` bytes

    for module in (buffers, shared_memory):
        monkeypatch.setattr(module, "available_memory", available)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=2 * size, available=size))
    assert pool.allocate((1, 9, *SHAPE[2:]))[0].nbytes < 2 * size
    with pytest.raises(OSError):
        open_shared(place.place)


def test_a_buffer_is_opened_only_by_its_exact_name(pool):
    _, place = pool.allocate(SHAPE)
    os.close(open_shared(place.place))
    with pytest.raises(FileNotFoundError, match="no longer shares"):
        open_shared(f"{place.place[:-1]}{'0' if place.place[-1] != '0' else '1'}")


def test_the_listening_thread_ends_when_no_memory_is_offered():
    gc.collect()
    before = {thread.name for thread in threading.enumerate()}
    pool = SharedBuffers()
    frames, _ = pool.allocate(SHAPE)
    assert "hv15-offers" in {thread.name for thread in threading.enumerate()}
    del frames
    gc.collect()
    pool.trim()
    for thread in threading.enumerate():
        if thread.name == "hv15-offers" and "hv15-offers" not in before:
            thread.join(5)
            assert not thread.is_alive()


def test_a_forked_child_that_exits_does_not_change_its_parents_buffers(pool):
    frames, place = pool.allocate(SHAPE)
    if (child := os.fork()) == 0:
        del frames
        gc.collect()
        pool.trim()
        os._exit(0)
    os.waitpid(child, 0)
    open_tensor(place).fill_(0.25)
    assert (frames == 0.25).all()
    assert torch.is_tensor(frames)
