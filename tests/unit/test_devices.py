"""Capabilities of devices and environment variables for ranks. No device other than the CPU is needed."""

import pytest
import torch

from distributed.ranks import devices, memory
from distributed.ranks.devices import Device, environment, host_memory, kind_of

GIB = 2**30
CPU = Device(torch.device("cpu"))


def test_host_memory_is_divided_between_the_ranks_on_the_cpu(monkeypatch):
    monkeypatch.setattr(devices, "available_memory", lambda: 12 * GIB)
    assert CPU.free_bytes() == 12 * GIB and CPU.free_bytes(3) == 4 * GIB
    assert CPU.held_by_others() == ""


def test_nothing_is_reserved_on_the_cpu(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("memory was allocated")

    monkeypatch.setattr(torch, "empty", refuse)
    CPU.reserve(2**60)
    CPU.empty_cache()


@pytest.mark.parametrize(
    ("name", "backend", "streams", "fused", "npu"),
    [
        ("cpu", "gloo", False, False, False),
        ("cuda:1", "cpu:gloo,cuda:nccl", True, True, False),
        ("npu:0", "cpu:gloo,npu:hccl", True, False, True),
    ],
)
def test_each_device_type_has_its_own_capabilities(name, backend, streams, fused, npu):
    class Named:  # torch cannot create an npu device without torch_npu
        type = kind_of(name)

    device = Device(Named())
    assert device.collective_backend("auto") == backend
    assert device.has_streams == streams and device.has_fused_kernels == fused
    assert device.has_npu_kernels == npu
    assert (device.process_group_device is None) == device.is_host


def test_a_device_without_streams_needs_no_events():
    device = Device(torch.device("mps"))
    assert not device.has_streams and device.new_stream() is None
    with device.on(None):
        event = device.mark()
        device.wait(event)
    event.synchronize()


def test_a_chosen_backend_is_used_for_device_tensors_only():
    assert Device(torch.device("cuda:0")).collective_backend("gloo") == "cpu:gloo,cuda:gloo"


class Accelerator:
    """The torch module of a device with 10 GiB, of which this process reserves 3 GiB and others use 2 GiB."""

    def mem_get_info(self, device):
        return 5 * GIB, 10 * GIB

    def memory_reserved(self, device):
        return 3 * GIB

    def memory_allocated(self, device):
        return GIB


def test_free_memory_includes_torchs_cache_and_excludes_memory_of_other_processes(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: Accelerator())
    device = Device(torch.device("cuda:0"))
    assert device.free_bytes() == device.free_bytes(4) == 7 * GIB
    assert device.held_by_others() == "other processes hold 2.00 of 10.00 GiB"


def test_an_allocation_of_more_host_memory_than_is_available_is_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr(devices, "available_memory", lambda: GIB)
    monkeypatch.setattr(devices, "describe_memory", lambda: "1.00 GiB is available (the machine has 2.00 GiB)")
    with pytest.raises(MemoryError, match=r"^4\.00 GiB of host memory is needed; 1\.00 GiB is available \(the machine"):
        host_memory(GIB, torch.float32)
    assert host_memory(1000, torch.float16).nbytes == 2000
    assert memory.available_memory() > 0


@pytest.mark.parametrize("setting", ["eth0", "", None])
def test_ranks_communicate_over_loopback_even_if_another_interface_is_set(monkeypatch, setting):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False) if setting is None else monkeypatch.setenv(name, setting)
    for kind in ("cpu", "cuda"):
        variables = environment(kind, None)
        assert variables["GLOO_SOCKET_IFNAME"] == variables["NCCL_SOCKET_IFNAME"] == "lo"


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(32, 2, 8), (32, 4, 8), (24, 4, 6), (8, 4, 4), (2, 1, 4)])
def test_ranks_share_the_cores_for_their_copies(monkeypatch, cores, ranks, threads):
    monkeypatch.setattr(devices, "cores", lambda: cores)
    assert devices.copiers(ranks) == threads
