"""The one place where NVIDIA GPUs, Ascend NPUs and CPUs differ.

Elsewhere a device is a `torch.device`, and what it can do is asked of `torch.get_device_module`.
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

import torch

COLLECTIVES = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}
MOST_RANKS = 64
HCCL_PORTS = range(50000, 65000, 64)
"""First ports of the ranges that groups on one host use for HCCL; each group needs its own. The last one marks it."""
HCCL_TAKES = 32
"""Ports that HCCL takes from HCCL_IF_BASE_PORT on (CANN 8.3; 16 in 8.0)."""
COPIERS = 4
"""CPU threads of a rank on an accelerator. They carry finished frames into the shared buffer, which one does so slowly
that a decode ended 16 ms after its last kernel (720x1280x121 on two H100)."""


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
    kinds = {device.split(":")[0] for device in parsed}
    if len(kinds) > 1:
        raise ValueError(f"devices mixes {' and '.join(sorted(kinds))}; all ranks of a group are of one kind.")
    twice = sorted({device for device in parsed if device != "cpu" and parsed.count(device) > 1})
    if twice:
        raise ValueError(f"devices names {', '.join(twice)} more than once; each rank needs a device of its own.")
    return tuple(parsed)


def check_devices(devices: Sequence[str], backend: str) -> None:
    """Raise ValueError where a device is not there, saying which are, or where the backend is not for its kind."""
    kind = devices[0].split(":")[0]
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
    kind = name.split(":")[0]
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

    Where there is no more to pin, of which Windows and WSL set a limit, other memory does, more slowly.
    """
    try:
        return torch.empty(count, dtype=dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(count, dtype=dtype)


def collective_backend(kind: str, chosen: str) -> str:
    """torch.distributed's backend string: small agreements over gloo, borders over the device's own library."""
    own = COLLECTIVES[kind] if chosen == "auto" else chosen
    return "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{own}"


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
        loopback = {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    if kind == "npu":
        port = ports.getsockname()[1] - HCCL_PORTS.step + 1
        return {**loopback, "HCCL_IF_BASE_PORT": str(port), "HCCL_DETERMINISTIC": "true"}
    if kind == "cuda":
        # The windows are large and live as long as a decode; without this the cache breaks up between sizes.
        return {**loopback, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return loopback


def automatic_dtype(devices: Sequence[str]) -> str:
    """float32 on the CPU; bfloat16 on accelerators, but float16 where a GPU is older than Ampere and has none."""
    kind = devices[0].split(":")[0]
    if kind == "cuda" and min(torch.cuda.get_device_capability(device)[0] for device in devices) < 8:
        return "float16"
    return "float32" if kind == "cpu" else "bfloat16"
