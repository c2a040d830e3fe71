"""The one place where NVIDIA GPUs, Ascend NPUs and CPUs differ.

Elsewhere what a device can do is asked of a `Device`, and nobody compares its kind with a string.
Ascend support is written against torch_npu's documented interface and has not been run on hardware. There, replicate
padding has no bfloat16; the decoder copies its borders itself (`kernels.fill_groups`) and needs none.
"""

import errno
import os
import random
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from .memory import available_memory, describe_memory

COLLECTIVES = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}
MOST_RANKS = 64
HCCL_PORTS = range(50000, 65000, 64)
"""First ports of the ranges that groups on one host use for HCCL; each group needs its own. The last one marks it."""
HCCL_TAKES = 32
"""Ports that HCCL takes from HCCL_IF_BASE_PORT on (CANN 8.3; 16 in 8.0)."""
COPIERS = 4
"""CPU threads of a rank on an accelerator. They carry finished frames into the shared buffer, which one does so slowly
that a decode ended 16 ms after its last kernel (720x1280x121 on two H100)."""


@dataclass(frozen=True)
class Device:
    """What one rank computes on, and what it can do. `Device(torch.device("cuda:1"))`."""

    torch: torch.device

    @property
    def kind(self) -> str:
        """ "cuda", "npu" or "cpu"."""
        return self.torch.type

    @property
    def is_host(self) -> bool:
        """Whether its memory is the host's, which all ranks share, and nothing travels to it or from it."""
        return self.kind == "cpu"

    @property
    def has_streams(self) -> bool:
        """Whether copies run beside the computation, on streams of `module`."""
        return not self.is_host

    @property
    def has_fused_kernels(self) -> bool:
        """Whether the Triton kernels can run on it, where Triton is installed."""
        return self.kind == "cuda"

    @property
    def forms_attention_scores(self) -> bool:
        """Whether attention holds the whole matrix of scores in the device's memory."""
        return self.kind == "cuda"

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """What kind of NVIDIA GPU it is; None for all other devices."""
        if self.kind != "cuda" or torch.version.hip:
            return None
        return torch.cuda.get_device_capability(self.torch)

    @property
    def module(self) -> ModuleType:
        """Torch's functions for it, such as `torch.cuda`. Raises RuntimeError for the CPU, which has none."""
        return torch.get_device_module(self.torch)

    @property
    def process_group_device(self) -> torch.device | None:
        """What torch.distributed is to bind a process group to."""
        return None if self.is_host else self.torch

    def free_bytes(self, ranks: int = 1) -> int:
        """Bytes that nobody uses, for one of `ranks` that share the host; what torch keeps for later is not used."""
        if self.is_host:
            return available_memory() // ranks
        free, _ = self.module.mem_get_info(self.torch)
        return free + self.module.memory_reserved(self.torch) - self.module.memory_allocated(self.torch)

    def held_by_others(self) -> str:
        """What other processes hold of its memory, for an error; empty for the CPU."""
        if self.is_host:
            return ""
        free, total = self.module.mem_get_info(self.torch)
        others = max(0, total - free - self.module.memory_reserved(self.torch))
        return f"other processes hold {others / 2**30:.2f} of {total / 2**30:.2f} GiB"

    def reserve(self, needed: int) -> None:
        """Have torch's allocator hold `needed` bytes in all, for what comes next. Raises torch.OutOfMemoryError."""
        if not self.is_host:
            there = self.module.memory_allocated(self.torch)
            torch.empty(max(0, needed - there), dtype=torch.uint8, device=self.torch)

    def empty_cache(self) -> None:
        """Give back what torch's allocator keeps for later."""
        if not self.is_host:
            self.module.empty_cache()

    def collective_backend(self, chosen: str) -> str:
        """torch.distributed's backend string: small agreements over gloo, borders over the device's own library."""
        own = COLLECTIVES[self.kind] if chosen == "auto" else chosen
        return "gloo" if self.is_host else f"cpu:gloo,{self.kind}:{own}"


def parse_devices(devices: str | Sequence[str]) -> tuple[str, ...]:
    """One device for each rank, from `auto`, "cuda:0,cuda:1", "npu:0-3", "cpu,cpu" or a list of such.

    Raises ValueError for what cannot be read, for a mixture of kinds, and for the same accelerator twice.
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
            raise ValueError(f"devices has {word!r}, a range that ends before it begins.")
        elif match:
            parsed.extend(f"{match[1]}:{i}" for i in range(int(match[2]), int(match[3] or match[2]) + 1))
        else:
            raise ValueError(
                f"devices has {word!r}. Write auto, or a list such as cuda:0,cuda:1 or npu:0-3 or cpu,cpu."
            )
    if not parsed:
        raise ValueError("devices is empty. Write auto, or a list such as cuda:0,cuda:1 or cpu,cpu.")
    if len(parsed) > MOST_RANKS:
        raise ValueError(f"devices names {len(parsed)} ranks; a group has {MOST_RANKS} at the most.")
    kinds = set(map(kind_of, parsed))
    if len(kinds) > 1:
        raise ValueError(f"devices mixes {' and '.join(sorted(kinds))}; all ranks of a group are of one kind.")
    twice = sorted({device for device in parsed if device != "cpu" and parsed.count(device) > 1})
    if twice:
        raise ValueError(f"devices names {', '.join(twice)} more than once; each rank needs a device of its own.")
    return tuple(parsed)


def kind_of(device: str) -> str:
    """ "cuda", "npu" or "cpu", of one of `parse_devices`'s."""
    return device.split(":")[0]


def check_devices(devices: Sequence[str], backend: str) -> None:
    """Raise ValueError where a device is not there, saying which are, or where the backend is not for its kind."""
    kind = kind_of(devices[0])
    if backend not in ("auto", COLLECTIVES[kind]):
        raise ValueError(f"backend is {backend!r}; ranks on {kind} devices use auto or {COLLECTIVES[kind]}.")
    there = device_count(kind)
    missing = [device for device in devices if kind != "cpu" and int(device.split(":")[1]) >= there]
    if missing:
        has = ", ".join(f"{kind}:{i}" for i in range(there)) or f"no {kind} device"
        raise ValueError(f"devices asks for {', '.join(missing)}; this machine has {has}.")


def device_count(kind: str) -> int:
    """How many devices of this kind torch sees here."""
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


def activate(name: str) -> torch.device:
    """Make this process compute on the device `name`."""
    kind = kind_of(name)
    if kind == "cpu":
        # More threads would add up in another order, and a tiled decode would differ with the number of ranks.
        torch.set_num_threads(1)
        return torch.device("cpu")
    torch.set_num_threads(COPIERS)
    if kind == "npu":
        if not _import_npu():
            raise RuntimeError("An npu device needs torch_npu, which is not installed. Install the extra 'npu'.")
        # The same sums in the same order every time, so that tiled decodes agree bit by bit.
        torch.use_deterministic_algorithms(True, warn_only=True)
    device = torch.device(name)
    torch.get_device_module(device).set_device(device)
    if kind == "cuda":
        torch.backends.cudnn.benchmark = False  # heuristics choose alike in every process; a search may not
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return device


def host_memory(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Host memory for so many numbers to travel to a device or from it: pinned, which is fast and slow to get.

    Where there is no more to pin, of which Windows and WSL set a limit, other memory does, more slowly. Raises
    MemoryError, with the numbers, where the machine or the container has not so much memory.
    """
    size = count * dtype.itemsize
    if size > available_memory():
        raise MemoryError(f"{size / 2**30:.2f} GiB of host memory is needed; {describe_memory()}.")
    try:
        return torch.empty(count, dtype=dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(count, dtype=dtype)


def reserve_ports(kind: str) -> socket.socket | None:
    """For Ascend: a range of ports that no other group on this host has, for as long as the socket is open.

    The socket holds the last port of the range, on loopback; whoever wants the range finds it taken. A range is passed
    over where another program has a port that HCCL would take. Raises OSError where no range is left.
    """
    if kind != "npu":
        return None
    for first in random.sample(HCCL_PORTS, len(HCCL_PORTS)):
        mark = _bound("127.0.0.1", first + HCCL_PORTS.step - 1)
        if mark and all(map(_is_free, range(first, first + HCCL_TAKES))):
            return mark
        if mark:
            mark.close()
    raise OSError(errno.EADDRINUSE, f"all {len(HCCL_PORTS)} port ranges for HCCL are taken")


def _bound(address: str, port: int) -> socket.socket | None:
    """A socket that holds this port, or None where someone has it."""
    holder = socket.socket()
    try:
        holder.bind((address, port))
    except OSError:
        holder.close()
        return None
    return holder


def _is_free(port: int) -> bool:
    """Whether nobody on this host has the port, on any interface."""
    if holder := _bound("", port):
        holder.close()
    return holder is not None


def environment(kind: str, ports: socket.socket | None) -> dict[str, str]:
    """Environment of the ranks. Nothing listens beyond loopback.

    HCCL chooses its interface itself: that it would take loopback could not be tried on hardware.
    """
    loopback = {}
    if sys.platform == "linux":
        loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if kind == "npu":
        port = ports.getsockname()[1] - HCCL_PORTS.step + 1
        return {**loopback, "HCCL_IF_BASE_PORT": str(port), "HCCL_DETERMINISTIC": "true"}
    if kind == "cuda":
        # The windows are large and live as long as a decode; without this the cache breaks up between sizes.
        return {**loopback, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return loopback


def automatic_dtype(devices: Sequence[str]) -> str:
    """float32 on the CPU; bfloat16 on accelerators, but float16 where a GPU is older than Ampere and has none."""
    kind = kind_of(devices[0])
    if kind == "cuda" and min(torch.cuda.get_device_capability(device)[0] for device in devices) < 8:
        return "float16"
    return "float32" if kind == "cpu" else "bfloat16"
