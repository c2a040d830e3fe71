"""The rank groups that are alive in this ComfyUI, found by their description.

What travels on sockets is the description; ComfyUI caches that, and it outlives any group. The group itself is made
when it is first asked for and stays until ComfyUI ends or somebody stops it.
"""

import atexit
import logging
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import folder_paths

from ..distributed import RankGroup
from ..distributed.ranks.devices import check_devices, parse_devices

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupDescription:
    """A rank group's options, as the Rank Group node takes them."""

    devices: str = "auto"
    backend: str = "auto"
    dtype: str = "auto"
    keep_loaded: str = "keep"
    start_timeout: float = 180
    stall_timeout: float = 120


_groups: dict[tuple[str, ...], RankGroup] = {}
"""By the devices of their ranks."""
_lock = threading.Lock()


def live_group(description: GroupDescription | None) -> RankGroup:
    """The group of that description, or of the default one. One that lives on the same devices takes its options.

    Raises ValueError for devices that are not there, and what is no description.
    """
    if description is None:
        description = GroupDescription()
    if not isinstance(description, GroupDescription):
        raise ValueError(f"rank_group holds {description!r}; connect it to a Rank Group node, or leave it free.")
    options = asdict(description)
    devices, backend = parse_devices(options.pop("devices")), options.pop("backend")
    check_devices(devices, backend)
    with _lock:
        if group := _groups.get(devices):
            group.configure(**options)
            return group
        logs = Path(folder_paths.get_user_directory()) / "hv15_logs"
        group = _groups[devices] = RankGroup(devices, backend=backend, logs=logs, **options)
        group.on_change = lambda: announce(group)
        return group


def all_groups() -> list[RankGroup]:
    with _lock:
        return list(_groups.values())


def find_group(id: str) -> RankGroup | None:
    return next((group for group in all_groups() if group.id == id), None)


def announce(group: RankGroup) -> None:
    """Tell the browsers how a group is."""
    if (server := running_server()) is not None:
        try:
            server.send_sync("hv15.group", public_status(group))
        except RuntimeError:
            log.debug("ComfyUI's loop has ended; nobody is left to tell.")


def running_server() -> object | None:
    """ComfyUI's server, where this process is one."""
    from server import PromptServer

    return getattr(PromptServer, "instance", None)


def public_status(group: RankGroup) -> dict:
    """A group's status without its error's log lines, which may hold paths."""
    status = group.status()
    return {**status, "error": status["error"] and status["error"].split("\n")[0]}


@atexit.register
def stop_all() -> None:
    for group in all_groups():
        group.stop()
