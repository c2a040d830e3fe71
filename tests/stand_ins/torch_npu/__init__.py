"""A stand-in for Ascend's torch_npu on machines without an NPU. Only tests put it on the path.

It gives torch a device named "npu", the functions of `torch.npu` that this pack calls, and the backend "hccl", which is
gloo. Tensors created on such a device are CPU tensors, because torch cannot have a device without compiled kernels. So
the tests that use it show that our code takes the right steps in the right order on "npu" devices: parsing names,
starting, choosing the backend, streams and pinned memory, memory queries, the decode, the frames. They do not show that
torch_npu's kernels exist, are right or are fast. They show nothing about HCCL: "hccl" is chosen and started as on
Ascend, but torch selects the backend by a tensor's device, so ranks communicate through gloo. They do not show that a
tensor was copied to the device, or that streams are waited for. Nothing here has been run on hardware.
"""

import contextlib
import os
import types
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

GIB = 2**30


def device_count() -> int:
    return int(os.environ["HV15_TEST_NPUS"])


def is_available() -> bool:
    return False  # otherwise ComfyUI would compute on it; this pack does not ask


def set_device(device: torch.device) -> None:
    """From now on, create this thread's npu tensors on the CPU."""
    if device.index >= device_count():
        raise RuntimeError(f"there is no {device}")
    torch.Tensor.record_stream = lambda tensor, stream: None  # it accepts only torch's own streams
    torch.set_num_threads(1)  # a device's sums do not depend on the host's threads
    _OnCpu().__enter__()


def mem_get_info(device: torch.device) -> tuple[int, int]:
    return 8 * GIB, 64 * GIB


def memory_reserved(device: torch.device) -> int:
    return 0


def memory_allocated(device: torch.device) -> int:
    return 0


def empty_cache() -> None:
    pass


class Event:
    def synchronize(self) -> None:
        pass


class Stream:
    def __init__(self, device: torch.device) -> None:
        assert device.type == "npu"

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def record_event(self) -> Event:
        return Event()


def current_stream(device: torch.device) -> Stream:
    return Stream(device)


@contextlib.contextmanager
def stream(chosen: Stream) -> Iterator[None]:
    assert isinstance(chosen, Stream)
    yield


def _cpu(value: object) -> object:
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "npu" else value


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {name: _cpu(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return function(*map(_cpu, args), **kwargs)


def _hccl(store: dist.Store, rank: int, size: int, timeout) -> dist.ProcessGroupGloo:
    if os.environ["HCCL_DETERMINISTIC"] != "true" or not os.environ["HCCL_IF_BASE_PORT"].isdigit():
        raise RuntimeError("the environment does not say what HCCL must know")
    if not torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("deterministic algorithms were not asked for")
    Path(os.environ["HV15_TEST_HCCL"], f"{rank} of {size}").touch()
    return dist.ProcessGroupGloo(store, rank, size, timeout)


torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", module := types.ModuleType("torch.npu"))
for name in (
    "device_count", "is_available", "set_device", "mem_get_info", "memory_reserved", "memory_allocated", "empty_cache",
    "Event", "Stream", "current_stream", "stream",
):  # fmt: skip
    setattr(module, name, globals()[name])
dist.Backend.register_backend("hccl", _hccl, devices=["npu"])
