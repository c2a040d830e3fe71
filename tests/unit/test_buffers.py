"""Shared memory: access, protection, limits, reuse and release."""

import gc
import mmap
import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from distributed.ranks import buffers, memory
from distributed.ranks.buffers import SharedBuffers, SharedMemory, open_shared, open_tensor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="buffers are files on other systems")
SHAPE = (1, 5, 16, 32, 3)


@pytest.fixture
def pool():
    pool = SharedBuffers()
    yield pool
    gc.collect()
    pool.trim()


def test_the_controller_reads_the_frames_a_rank_writes(pool):
    frames, place = pool.allocate(SHAPE)
    open_tensor(place).fill_(0.5)
    assert (frames == 0.5).all() and frames.shape == SHAPE


def test_a_buffer_is_reused_after_its_last_reference_is_deleted(pool):
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
    assert other != place, "a buffer more than twice the needed size was reused"


def test_a_buffer_in_use_during_a_trim_is_freed_when_it_is_returned(pool):
    frames, place = pool.allocate(SHAPE)
    pool.trim()
    assert open_tensor(place).sum() == 0
    del frames
    gc.collect()
    with pytest.raises(OSError):
        open_tensor(place)


def test_a_buffer_cannot_be_resized_or_sealed_further(pool):
    frames, place = pool.allocate(SHAPE)
    descriptor = open_shared(place.place)
    try:
        for size in (0, frames.nbytes * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
        with pytest.raises(PermissionError):
            buffers.fcntl.fcntl(descriptor, buffers.fcntl.F_ADD_SEALS, buffers.fcntl.F_SEAL_WRITE)
    finally:
        os.close(descriptor)
    assert frames.sum() == 0


def test_memory_offered_as_read_only_cannot_be_written():
    shared = SharedMemory("hv15-test", 4096)
    try:
        os.pwrite(shared.descriptor, b"words", 0)
        shared.offer(read_only=True)
        descriptor = open_shared(shared.place)
        try:
            assert os.pread(descriptor, 5, 0) == b"words"
            with pytest.raises(PermissionError):
                os.pwrite(descriptor, b"other", 0)
            with pytest.raises(PermissionError):
                mmap.mmap(descriptor, 4096)
        finally:
            os.close(descriptor)
    finally:
        shared.close()


def test_frames_larger_than_the_available_memory_are_rejected_before_allocation(pool):
    with pytest.raises(MemoryError, match=r"^12288\.00 GiB of memory is needed; \d+\.\d\d GiB is available \(the "):
        pool.allocate((1, 2**20, 2**10, 2**10, 3))
    assert not pool.lent


def test_free_buffers_are_released_to_allocate_larger_frames(pool, monkeypatch):
    frames, place = pool.allocate(SHAPE)
    size = frames.nbytes
    del frames
    gc.collect()
    left = size  # the free buffer holds as much again

    def available() -> int:
        return left + (0 if pool._free else size)

    monkeypatch.setattr(buffers, "available_memory", available)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=2 * size, available=left))
    assert pool.allocate((1, 9, *SHAPE[2:]))[0].nbytes < 2 * size
    with pytest.raises(OSError):
        open_shared(place.place)


def test_a_buffer_cannot_be_opened_without_its_name(pool):
    _, place = pool.allocate(SHAPE)
    os.close(open_shared(place.place))
    with pytest.raises(FileNotFoundError, match="no longer shares"):
        open_shared(f"{place.place[:-1]}{'0' if place.place[-1] != '0' else '1'}")


def test_the_listener_stops_when_no_buffer_is_offered():
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


def test_the_exit_of_a_forked_child_does_not_free_its_parents_buffers(pool):
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
