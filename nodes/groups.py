"""The rank groups that are alive in this ComfyUI, found by their description.

What travels on sockets is the description; ComfyUI caches that, and it outlives any group. The group itself is made
when it is first asked for. It ends with ComfyUI, when somebody stops it, or when others need its place.
"""

import atexit
import contextlib
import logging
import math
import os
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
from ..distributed.ranks.devices import check_devices, parse_devices
from . import memory

log = logging.getLogger(__name__)

MOST_GROUPS = 4
TIMEOUT_LEAST, TIMEOUT_MOST = 5, 3600
CPU_RANK_BYTES = 2**29
"""Memory of a rank on the CPU that has decoded nothing yet, roughly."""


@dataclass(frozen=True)
class GroupDescription:
    """A rank group's options, as the Rank Group node takes them. Raises ValueError for timeouts that cannot be."""

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
    """Decodes and preloads that have asked for the group and are not done with it."""
    used_at: float = field(default_factory=time.monotonic)


_groups: dict[tuple[str, ...], _Entry] = {}
"""By the set of the ranks' devices: their order does not matter."""
_lock = threading.RLock()


def live_group(description: GroupDescription | None) -> RankGroup:
    """The group of that description, or of the default one. One that lives on the same devices takes its options.

    Where there are too many groups, the idle one that was not used for the longest time ends. Raises ValueError for
    devices that are not there or too many, and for what is no description.
    """
    with _lock:
        return _entry(description).group


@contextlib.contextmanager
def group_in_use(description: GroupDescription | None) -> Iterator[RankGroup]:
    """As `live_group`. The group does not end for another's sake meanwhile."""
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
            raise ValueError(f"{len(_groups)} rank groups are decoding; wait for one of them, or use its devices.")
        _end(idle, "another group is to start")
    entry = _groups[key] = _Entry(group)
    return entry


def _devices(devices: str) -> tuple[str, ...]:
    """As `parse_devices`; auto is the CPU where ComfyUI was started with --cpu."""
    if (
        str(devices).strip().lower() == "auto"
        and comfy.model_management.cpu_state is comfy.model_management.CPUState.CPU
    ):
        devices = "cpu,cpu"
    return parse_devices(devices)


def check_cpu_ranks(devices: tuple[str, ...]) -> None:
    """Raise ValueError for more ranks on the CPU than its cores or its memory can carry. Two always may start."""
    if devices[0] != "cpu" or len(devices) <= 2:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = int(psutil.virtual_memory().available // CPU_RANK_BYTES)
    if len(devices) > min(cores, room):
        raise ValueError(
            f"devices names {len(devices)} CPU ranks; this machine has {cores} cores, and free memory for {room} ranks."
        )


def _least_recently_used(keys: object) -> tuple[str, ...] | None:
    """Of the groups with these keys, the one that nobody uses and nobody has used for the longest time."""
    idle = [key for key in keys if not _groups[key].users and _groups[key].group.status()["state"] != "busy"]
    return min(idle, key=lambda key: _groups[key].used_at, default=None)


def end_neighbours(group: RankGroup) -> None:
    """End idle groups that hold an accelerator of this group's. Those that are in use release their memory."""
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
    """End a group and forget it. The lock is held."""
    group = _groups.pop(key).group
    log.info("The rank group on %s ends: %s.", ", ".join(group.devices), reason)
    group.stop()
    memory.forget(group)


def all_groups() -> list[RankGroup]:
    with _lock:
        return [entry.group for entry in _groups.values()]


def find_group(id: str) -> RankGroup | None:
    return next((group for group in all_groups() if group.id == id), None)


def announce(group: RankGroup) -> None:
    """Send a group's status to the browsers. Process ids are left out: every browser hears it."""
    if (server := running_server()) is not None:
        status = public_status(group)
        ranks = [{key: value for key, value in rank.items() if key != "pid"} for rank in status["ranks"]]
        try:
            server.send_sync("hv15.group", {**status, "ranks": ranks})
        except RuntimeError:
            log.debug("ComfyUI's loop has ended; nobody is left to tell.")


def running_server() -> object | None:
    """ComfyUI's server, where this process is one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def public_status(group: RankGroup) -> dict:
    """A group's status without its error's log lines, which may hold paths."""
    status = group.status()
    return {**status, "error": status["error"] and status["error"].split("\n")[0]}


@atexit.register
def stop_all() -> None:
    for group in all_groups():
        group.stop()
