"""The registry of running rank groups, by their devices.

Sockets carry a description of the group, not the group: ComfyUI caches socket values, and the description stays valid
when the group has stopped. The group is created on first use. It ends when ComfyUI ends, when the user stops it, or
when another group needs its devices or its place.
"""

import atexit
import contextlib
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import comfy.model_management
import folder_paths
import psutil

from ..distributed import RankGroup
from ..distributed.ranks.devices import check_devices, cores, parse_devices
from . import memory

log = logging.getLogger(__name__)

MOST_GROUPS = 4
TIMEOUT_LEAST, TIMEOUT_MOST = 5, 3600
CPU_RANK_BYTES = 2**29
"""Approximate memory in bytes of a CPU rank before its first decode."""


@dataclass(frozen=True)
class GroupDescription:
    """A rank group's options: the inputs of the Rank Group node. Raises ValueError for invalid timeouts."""

    devices: str = "auto"
    backend: str = "auto"
    dtype: str = "auto"
    keep_loaded: str = "keep"
    start_timeout: float = 180
    stall_timeout: float = 120

    def __post_init__(self) -> None:
        for name in ("start_timeout", "stall_timeout"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not TIMEOUT_LEAST <= value <= TIMEOUT_MOST:
                raise ValueError(
                    f"{name} is {value!r}; it must be a number of seconds from {TIMEOUT_LEAST} to {TIMEOUT_MOST}."
                )


@dataclass
class _Entry:
    group: RankGroup
    users: int = 0
    """Number of jobs and preloads that use the group at this moment."""
    used_at: float = field(default_factory=time.monotonic)


_groups: dict[tuple[str, ...], _Entry] = {}
"""The key is the sorted devices, so that their order does not matter."""
_lock = threading.RLock()


def live_group(description: GroupDescription | None) -> RankGroup:
    """Return the group on the description's devices, created if necessary, with the description's options.

    None is the default description. If there are MOST_GROUPS groups already, the idle group that was unused for the
    longest time ends. Raises ValueError for missing devices, for too many ranks or groups, and for anything that is not
    a GroupDescription.
    """
    with _lock:
        return _entry(description).group


@contextlib.contextmanager
def group_in_use(description: GroupDescription | None) -> Iterator[RankGroup]:
    """Yield the group of `live_group`, which does not end in favour of another group within the context."""
    with _lock:
        entry = _entry(description)
        entry.users += 1
    try:
        yield entry.group
    finally:
        with _lock:
            entry.users -= 1
            entry.used_at = time.monotonic()


def _entry(description: GroupDescription | None) -> _Entry:
    if description is None:
        description = GroupDescription()
    if not isinstance(description, GroupDescription):
        raise ValueError(f"rank_group holds {description!r}; connect it to a Rank Group node, or leave it unconnected.")
    options = asdict(description)
    devices, backend = _devices(options.pop("devices")), options.pop("backend")
    check_devices(devices, backend)
    key = tuple(sorted(devices))
    if entry := _groups.get(key):
        entry.group.configure(**options)
        entry.used_at = time.monotonic()
        return entry
    check_cpu_ranks(devices)
    logs = Path(folder_paths.get_user_directory()) / "hv15_logs"
    group = RankGroup(devices, backend=backend, logs=logs, **options)
    group.on_change = lambda: announce(group)
    while len(_groups) >= MOST_GROUPS:
        if (idle := _least_recently_used(_groups)) is None:
            raise ValueError(
                f"All {len(_groups)} rank groups are in use. Wait until one is idle, or use the same devices."
            )
        _end(idle, "another group needs its place")
    entry = _groups[key] = _Entry(group)
    return entry


def _devices(devices: str) -> tuple[str, ...]:
    """Parse the devices. "auto" means two CPU ranks if ComfyUI was started with --cpu."""
    if (
        str(devices).strip().lower() == "auto"
        and comfy.model_management.cpu_state is comfy.model_management.CPUState.CPU
    ):
        devices = "cpu,cpu"
    return parse_devices(devices)


def check_cpu_ranks(devices: tuple[str, ...]) -> None:
    """Raise ValueError for more CPU ranks than cores, or than fit into free memory. Two are always allowed."""
    if devices[0] != "cpu" or len(devices) <= 2:
        return
    fitting = int(psutil.virtual_memory().available // CPU_RANK_BYTES)
    if len(devices) > min(cores(), fitting):
        raise ValueError(
            f"devices lists {len(devices)} CPU ranks; this machine has {cores()} cores "
            f"and free memory for {fitting} ranks."
        )


def _least_recently_used(keys: object) -> tuple[str, ...] | None:
    """Return the key of the idle group that was unused for the longest time, or None if all are in use."""
    idle = [key for key in keys if not _groups[key].users and _groups[key].group.status()["state"] != "busy"]
    return min(idle, key=lambda key: _groups[key].used_at, default=None)


def end_neighbours(group: RankGroup) -> None:
    """End the idle groups that share an accelerator with this group. Groups in use release their memory instead."""
    devices = {device for device in group.devices if device != "cpu"}
    with _lock:
        keys = [key for key, entry in _groups.items() if entry.group is not group and devices.intersection(key)]
        while keys and (idle := _least_recently_used(keys)):
            keys.remove(idle)
            _end(idle, f"another group needs {', '.join(sorted(devices.intersection(idle)))}")
        busy = [_groups[key].group for key in keys]
    for other in busy:
        other.release()


def _end(key: tuple[str, ...], reason: str) -> None:
    """Stop a group and remove it from the registry. The caller holds the lock."""
    group = _groups.pop(key).group
    log.info("Stopping the rank group on %s: %s.", ", ".join(group.devices), reason)
    group.stop()
    memory.forget(group)


def all_groups() -> list[RankGroup]:
    with _lock:
        return [entry.group for entry in _groups.values()]


def find_group(id: str) -> RankGroup | None:
    return next((group for group in all_groups() if group.id == id), None)


def announce(group: RankGroup) -> None:
    """Send a group's status to all browsers, without process ids, because every browser receives it."""
    if (server := running_server()) is not None:
        status = public_status(group)
        ranks = [{key: value for key, value in rank.items() if key != "pid"} for rank in status["ranks"]]
        try:
            server.send_sync("hv15.group", {**status, "ranks": ranks})
        except RuntimeError:
            log.debug("ComfyUI's event loop has ended; the status was not sent.")


def running_server() -> object | None:
    """Return ComfyUI's server, or None if this process runs none."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def public_status(group: RankGroup) -> dict:
    """Return a group's status with the first line of its error only: log lines may contain paths."""
    status = group.status()
    return {**status, "error": status["error"] and status["error"].split("\n")[0]}


@atexit.register
def stop_all() -> None:
    for group in all_groups():
        group.stop()
