"""Differences between NVIDIA GPUs, Ascend NPUs and CPUs.

All other modules query the capabilities of a `Device` and never compare its kind with a string.
Ascend support is written against torch_npu's documented interface and has not been run on hardware. Replicate padding
does not support bfloat16 on Ascend; the decoder does not use it, because it copies borders itself
(`kernels.fill_groups`).
"""

import contextlib
import errno
import os
import random
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch

from .memory import available_memory, describe_memory

COLLECTIVES = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}
MOST_RANKS = 64
HCCL_PORTS = range(50000, 65000, 64)
"""First ports of the port ranges for HCCL. Each group on a host needs its own range, and binds the range's last port to
reserve it."""
HCCL_USED = 32
"""Number of ports that HCCL uses, starting at HCCL_IF_BASE_PORT (CANN 8.3; 16 in 8.0)."""
COPIERS = 4, 8
"""Fewest and most CPU threads of a rank on an accelerator. They copy finished frames into the shared buffer: with one
thread, a decode ended 16 ms after its last kernel (720x1280x121 on two H100). They copy weights into pinned memory, at
24 GB/s with four threads and 40 GB/s with eight (H200 host)."""


class Event(Protocol):
    """A point in the work of a device's stream."""

    def synchronize(self) -> None:
        """Wait until the work before this point is done."""


class _Past:
    """The `Event` of devices without streams: their work is done, or precedes all that is launched later."""

    def synchronize(self) -> None:
        pass


@dataclass(frozen=True)
class Device:
    """The device of one rank and its capabilities: `Device(torch.device("cuda:1"))`."""

    torch: torch.device

    @property
    def kind(self) -> str:
        """The device type: "cuda", "npu" or "cpu"."""
        return self.torch.type

    @property
    def is_host(self) -> bool:
        """Whether the device uses host memory, which all ranks share. No transfers to or from it are needed."""
        return self.kind == "cpu"

    @property
    def has_streams(self) -> bool:
        """Whether copies can overlap with computation, on streams of `module`. MPS and DirectML have none."""
        return self.kind in ("cuda", "npu", "xpu")

    @property
    def has_fused_kernels(self) -> bool:
        """Whether fused kernels support the device: `torch._addmm_activation`, and Triton's if Triton is installed."""
        return self.kind == "cuda"

    @property
    def has_npu_kernels(self) -> bool:
        """Whether torch_npu's fused kernels support the device."""
        return self.kind == "npu"

    @property
    def forms_attention_scores(self) -> bool:
        """Whether attention stores the whole matrix of scores in device memory."""
        return self.kind == "cuda"

    @property
    def has_symmetric_memory(self) -> bool:
        """Whether this PyTorch lets ranks write into each other's memory on such devices."""
        if self.kind != "cuda" or torch.version.hip:
            return False
        try:
            from torch.distributed import _symmetric_memory
        except ImportError:
            return False
        return hasattr(_symmetric_memory, "empty") and hasattr(_symmetric_memory, "rendezvous")

    def reaches(self, index: int) -> bool:
        """Return whether this device can write into the memory of a device of its type."""
        return index == self.torch.index or self.module.can_device_access_peer(self.torch.index, index)

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """The compute capability of an NVIDIA GPU; None for all other devices."""
        if self.kind != "cuda" or torch.version.hip:
            return None
        return torch.cuda.get_device_capability(self.torch)

    @property
    def module(self) -> ModuleType:
        """The torch module of the device type, such as `torch.cuda`. Raises RuntimeError for the CPU."""
        return torch.get_device_module(self.torch)

    def new_stream(self) -> object | None:
        """Return a new stream, on which copies can overlap with computation; None for the CPU."""
        return self.module.Stream(self.torch) if self.has_streams else None

    def on(self, stream: object | None) -> contextlib.AbstractContextManager:
        """Return a context in which this thread uses a stream from `new_stream`."""
        return self.module.stream(stream) if self.has_streams else contextlib.nullcontext()

    def mark(self) -> Event:
        """Return an event after all work that was launched so far on this thread's stream."""
        return self.module.current_stream(self.torch).record_event() if self.has_streams else _Past()

    def wait(self, event: Event) -> None:
        """Let work that is launched from now on, on this thread's stream, start after the event."""
        if self.has_streams:
            self.module.current_stream(self.torch).wait_event(event)

    @property
    def process_group_device(self) -> torch.device | None:
        """The device to which torch.distributed binds a process group; None for the CPU."""
        return None if self.is_host else self.torch

    def free_bytes(self, ranks: int = 1) -> int:
        """Return the free memory in bytes. Memory that torch's allocator caches counts as free.

        ranks: number of ranks that share the host; host memory is divided equally between them.
        """
        if self.is_host:
            return available_memory() // ranks
        free, _ = self.module.mem_get_info(self.torch)
        return free + self.module.memory_reserved(self.torch) - self.module.memory_allocated(self.torch)

    def held_by_others(self) -> str:
        """Return a text on the device memory that other processes use, for error messages; empty for the CPU."""
        if self.is_host:
            return ""
        free, total = self.module.mem_get_info(self.torch)
        others = max(0, total - free - self.module.memory_reserved(self.torch))
        return f"other processes hold {others / 2**30:.2f} of {total / 2**30:.2f} GiB"

    def reserve(self, needed: int) -> None:
        """Grow the cache of torch's allocator so that `needed` bytes in total are allocated or cached.

        Raises torch.OutOfMemoryError.
        """
        if not self.is_host:
            allocated = self.module.memory_allocated(self.torch)
            torch.empty(max(0, needed - allocated), dtype=torch.uint8, device=self.torch)

    def empty_cache(self) -> None:
        """Free the memory that torch's allocator caches."""
        if not self.is_host:
            self.module.empty_cache()

    def collective_backend(self, chosen: str) -> str:
        """Return the backend string for torch.distributed.

        CPU tensors, with which ranks agree on small values, use gloo; device tensors use the chosen backend, by
        default the device's own library.
        """
        own = COLLECTIVES[self.kind] if chosen == "auto" else chosen
        return "gloo" if self.is_host else f"cpu:gloo,{self.kind}:{own}"


def parse_devices(devices: str | Sequence[str]) -> tuple[str, ...]:
    """Return one device per rank, from "auto", "cuda:0,cuda:1", "npu:0-3", "cpu,cpu" or a list of such strings.

    Raises ValueError for invalid names, different device types, and accelerators that are named twice.
    """
    words = devices.split(",") if isinstance(devices, str) else list(devices)
    words = [word.strip().lower() for word in words if word.strip()]
    if words == ["auto"]:
        return _automatic()
    parsed: list[str] = []
    for word in words:
        match = re.fullmatch(r"(cuda|npu):(\d{1,3})(?:-(\d{1,3}))?", word)
        if word == "cpu":
            parsed.append("cpu")
        elif match and match[3] and int(match[3]) < int(match[2]):
            raise ValueError(f"devices has {word!r}, a range whose end is before its start.")
        elif match:
            parsed.extend(f"{match[1]}:{i}" for i in range(int(match[2]), int(match[3] or match[2]) + 1))
        else:
            raise ValueError(
                f"devices has {word!r}. Write auto, or a list such as cuda:0,cuda:1 or npu:0-3 or cpu,cpu."
            )
    if not parsed:
        raise ValueError("devices is empty. Write auto, or a list such as cuda:0,cuda:1 or cpu,cpu.")
    if len(parsed) > MOST_RANKS:
        raise ValueError(f"devices names {len(parsed)} ranks; a group can have at most {MOST_RANKS}.")
    kinds = set(map(kind_of, parsed))
    if len(kinds) > 1:
        raise ValueError(
            f"devices mixes {' and '.join(sorted(kinds))}; all ranks of a group must use the same device type."
        )
    twice = sorted({device for device in parsed if device != "cpu" and parsed.count(device) > 1})
    if twice:
        raise ValueError(f"devices names {', '.join(twice)} more than once; each rank needs a device of its own.")
    return tuple(parsed)


def kind_of(device: str) -> str:
    """Return the type ("cuda", "npu" or "cpu") of a device that `parse_devices` returned."""
    return device.split(":")[0]


def check_devices(devices: Sequence[str], backend: str) -> None:
    """Raise ValueError if a device does not exist, or if the backend does not support the device type."""
    kind = kind_of(devices[0])
    if backend not in ("auto", COLLECTIVES[kind]):
        raise ValueError(f"backend is {backend!r}; ranks on {kind} devices use auto or {COLLECTIVES[kind]}.")
    count = device_count(kind)
    missing = [device for device in devices if kind != "cpu" and int(device.split(":")[1]) >= count]
    if missing:
        has = ", ".join(f"{kind}:{i}" for i in range(count)) or f"no {kind} device"
        raise ValueError(f"devices asks for {', '.join(missing)}; this machine has {has}.")


def device_count(kind: str) -> int:
    """Return the number of devices of this type on this machine; for the CPU, the number of cores."""
    if kind == "cpu":
        return os.cpu_count() or 1
    if kind == "npu" and not _import_npu():
        return 0
    return torch.get_device_module(kind).device_count()


def _automatic() -> tuple[str, ...]:
    for kind in ("cuda", "npu"):
        if count := device_count(kind):
            return tuple(f"{kind}:{i}" for i in range(count))
    return "cpu", "cpu"


def _import_npu() -> bool:
    try:
        import torch_npu  # noqa: F401  registers the device with torch
    except ImportError:
        return False
    return True


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def copiers(ranks: int) -> int:
    """Return the number of CPU threads of each of `ranks` ranks on accelerators of this host."""
    fewest, most = COPIERS
    return max(fewest, min(most, cores() // ranks))


def activate(name: str, ranks: int) -> torch.device:
    """Set up this process to compute on the device `name`, beside the other ranks of this host, `ranks` in all.

    Raises RuntimeError for an NPU without torch_npu.
    """
    kind = kind_of(name)
    if kind == "cpu":
        # Several threads would sum in another order, and a tiled decode would depend on the number of ranks.
        torch.set_num_threads(1)
        return torch.device("cpu")
    # For all threads, also those that start later.
    torch.set_num_threads(copiers(ranks))
    if kind == "npu":
        if not _import_npu():
            raise RuntimeError("An npu device needs torch_npu, which is not installed. Install the extra 'npu'.")
        # Sums must have a fixed order so that tiled decodes are bitwise reproducible.
        torch.use_deterministic_algorithms(True, warn_only=True)
    device = torch.device(name)
    torch.get_device_module(device).set_device(device)
    if kind == "cuda":
        torch.backends.cudnn.benchmark = False  # unlike the heuristics, a search may choose differently in each process
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return device


def host_memory(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return host memory of `count` elements for transfers to or from a device, pinned if possible.

    Pinned memory is slow to allocate, but transfers are fast. Windows and WSL limit how much can be pinned; beyond the
    limit, pageable memory is returned. Raises MemoryError, with the numbers, if less memory is available.
    """
    size = count * dtype.itemsize
    if size > available_memory():
        raise MemoryError(f"{size / 2**30:.2f} GiB of host memory is needed; {describe_memory()}.")
    try:
        return torch.empty(count, dtype=dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(count, dtype=dtype)


def reserve_ports(kind: str) -> socket.socket | None:
    """Reserve a range of ports for HCCL on Ascend, until the returned socket is closed. Return None for other types.

    The socket binds the last port of the range on loopback, so no other group on this host reserves the same range.
    Ranges in which another program uses a port that HCCL needs are skipped. Raises OSError if no range is free.
    """
    if kind != "npu":
        return None
    for first in random.sample(HCCL_PORTS, len(HCCL_PORTS)):
        mark = _bound("127.0.0.1", first + HCCL_PORTS.step - 1)
        if mark and all(map(_is_free, range(first, first + HCCL_USED))):
            return mark
        if mark:
            mark.close()
    raise OSError(errno.EADDRINUSE, f"all {len(HCCL_PORTS)} port ranges for HCCL are in use")


def _bound(address: str, port: int) -> socket.socket | None:
    """Return a socket bound to this port, or None if the port is in use."""
    holder = socket.socket()
    try:
        holder.bind((address, port))
    except OSError:
        holder.close()
        return None
    return holder


def _is_free(port: int) -> bool:
    """Return whether the port is free on all interfaces of this host."""
    if holder := _bound("", port):
        holder.close()
    return holder is not None


def environment(kind: str, ports: socket.socket | None) -> dict[str, str]:
    """Return environment variables for ranks on devices of this type. They restrict communication to loopback.

    HCCL selects its interface itself: whether it accepts loopback could not be tested on hardware.
    """
    loopback = {}
    if sys.platform == "linux":
        loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if kind == "npu":
        port = ports.getsockname()[1] - HCCL_PORTS.step + 1
        return {**loopback, "HCCL_IF_BASE_PORT": str(port), "HCCL_DETERMINISTIC": "true"}
    if kind == "cuda":
        # The decoder's buffers are large and exist for a whole decode; without this, the cache becomes fragmented.
        return {**loopback, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return loopback


def automatic_dtype(devices: Sequence[str]) -> str:
    """Return float32 for CPUs and bfloat16 for accelerators; float16 for GPUs older than Ampere, without bfloat16."""
    kind = kind_of(devices[0])
    if kind == "cuda" and min(torch.cuda.get_device_capability(device)[0] for device in devices) < 8:
        return "float16"
    return "float32" if kind == "cpu" else "bfloat16"
