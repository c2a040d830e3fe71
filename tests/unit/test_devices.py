"""What a device can do, and what ranks are told of it, without any device but the CPU."""

import pytest
import torch

from distributed.ranks import devices, memory
from distributed.ranks.devices import Device, environment, host_memory, kind_of

GIB = 2**30
CPU = Device(torch.device("cpu"))


def test_the_cpu_has_the_hosts_memory_and_shares_it_between_the_ranks(monkeypatch):
    monkeypatch.setattr(devices, "available_memory", lambda: 12 * GIB)
    assert CPU.free_bytes() == 12 * GIB and CPU.free_bytes(3) == 4 * GIB
    assert CPU.held_by_others() == ""


def test_nothing_is_reserved_on_the_cpu(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("memory was taken")

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
def test_each_kind_has_its_own_abilities(name, backend, streams, fused, npu):
    class Named:  # torch makes no npu device without torch_npu
        type = kind_of(name)

    device = Device(Named())
    assert device.collective_backend("auto") == backend
    assert device.has_streams == streams and device.has_fused_kernels == fused
    assert device.has_npu_kernels == npu
    assert (device.process_group_device is None) == device.is_host


def test_a_chosen_backend_is_used_for_the_device_alone():
    assert Device(torch.device("cuda:0")).collective_backend("gloo") == "cpu:gloo,cuda:gloo"


class Accelerator:
    """Torch's functions for a device with 10 GiB, of which this process has 3 and others 2."""

    def mem_get_info(self, device):
        return 5 * GIB, 10 * GIB

    def memory_reserved(self, device):
        return 3 * GIB

    def memory_allocated(self, device):
        return GIB


def test_free_memory_includes_what_torch_keeps_for_later_and_excludes_that_of_others(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: Accelerator())
    device = Device(torch.device("cuda:0"))
    assert device.free_bytes() == device.free_bytes(4) == 7 * GIB
    assert device.held_by_others() == "other processes hold 2.00 of 10.00 GiB"


def test_host_memory_beyond_what_there_is_is_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr(devices, "available_memory", lambda: GIB)
    monkeypatch.setattr(devices, "describe_memory", lambda: "1.00 GiB is available (the machine has 2.00 GiB)")
    with pytest.raises(MemoryError, match=r"^4\.00 GiB of host memory is needed; 1\.00 GiB is available \(the machine"):
        host_memory(GIB, torch.float32)
    assert host_memory(1000, torch.float16).nbytes == 2000
    assert memory.available_memory() > 0


@pytest.mark.parametrize("setting", ["eth0", "", None])
def test_communication_stays_on_loopback_whatever_is_set_for_other_programs(monkeypatch, setting):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False) if setting is None else monkeypatch.setenv(name, setting)
    for kind in ("cpu", "cuda"):
        told = environment(kind, None)
        assert told["GLOO_SOCKET_IFNAME"] == told["NCCL_SOCKET_IFNAME"] == "lo"
