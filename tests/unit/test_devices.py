"""Capabilities and memory of devices, and the environment of ranks, tested on a CPU."""

import pytest
import torch

from distributed.ranks import devices, memory
from distributed.ranks.devices import Device, environment, host_memory, kind_of

GIB = 2**30
CPU = Device(torch.device("cpu"))


def test_ranks_on_the_cpu_share_the_host_memory(monkeypatch):
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
    ("name", "backend", "streams", "fused"),
    [
        ("cpu", "gloo", False, False),
        ("cuda:1", "cpu:gloo,cuda:nccl", True, True),
        ("npu:0", "cpu:gloo,npu:hccl", True, False),
    ],
)
def test_each_device_kind_has_its_own_capabilities(name, backend, streams, fused):
    class Named:  # torch.device("npu") needs torch_npu
        type = kind_of(name)

    device = Device(Named())
    assert device.collective_backend("auto") == backend
    assert device.has_streams == streams and device.has_fused_kernels == fused
    assert (device.process_group_device is None) == device.is_host


def test_an_explicit_backend_is_used_only_for_the_device():
    assert Device(torch.device("cuda:0")).collective_backend("gloo") == "cpu:gloo,cuda:gloo"


class Accelerator:
    """A device module of a device with 10 GiB, of which this process has reserved 3 and others hold 2."""

    taken = 0

    def mem_get_info(self, device):
        return 5 * GIB, 10 * GIB

    def memory_reserved(self, device):
        return 3 * GIB

    def memory_allocated(self, device):
        return GIB


def test_free_memory_includes_the_cache_of_torch_but_not_other_processes(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: Accelerator())
    device = Device(torch.device("cuda:0"))
    assert device.free_bytes() == device.free_bytes(4) == 7 * GIB
    assert device.held_by_others() == "other processes hold 2.00 of 10.00 GiB"


def test_allocating_more_than_the_host_memory_is_rejected_with_the_numbers(monkeypatch):
    monkeypatch.setattr(devices, "available_memory", lambda: GIB)
    monkeypatch.setattr(devices, "describe_memory", lambda: "1.00 GiB is available (the machine has 2.00 GiB)")
    with pytest.raises(MemoryError, match=r"^4\.00 GiB of host memory is needed; 1\.00 GiB is available \(the machine"):
        host_memory(GIB, torch.float32)
    assert host_memory(1000, torch.float16).nbytes == 2000
    assert memory.available_memory() > 0


@pytest.mark.parametrize("setting", ["eth0", "", None])
def test_communication_uses_loopback_for_any_interface_setting(monkeypatch, setting):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False) if setting is None else monkeypatch.setenv(name, setting)
    for kind in ("cpu", "cuda"):
        variables = environment(kind, None)
        assert variables["GLOO_SOCKET_IFNAME"] == variables["NCCL_SOCKET_IFNAME"] == "lo"
