"""How much memory of the host this process may still take: the smaller of what the machine and the container leave.

A container's limit is a control group's, of version 1 or 2, and groups nest: each level has a limit of its own. The
kernel kills a process that goes beyond any of them, so what is about to be taken is compared with all of them first.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNTS = Path("/proc/self/mountinfo")


def available_memory() -> int:
    """Bytes of host memory that this process may still take. The page cache, which gives way, counts as free."""
    return max(0, min([psutil.virtual_memory().available, *(room for _, room in _limits())]))


def describe_memory() -> str:
    """How much host memory is available and who limits it, for error messages."""
    tightest = min(_limits(), key=lambda limit: limit[1], default=None)
    total, host = psutil.virtual_memory().total, psutil.virtual_memory().available
    if tightest and tightest[1] < host:
        limit, room = tightest
        return f"{max(0, room) / 2**30:.2f} GiB is available (the container's limit is {limit / 2**30:.2f} GiB)"
    return f"{host / 2**30:.2f} GiB is available (the machine has {total / 2**30:.2f} GiB)"


def _limits() -> list[tuple[int, int]]:
    """Of each control group that limits this process, its limit and what is left of it, in bytes."""
    found = []
    for folder, top, names in _control_groups():
        while True:
            with contextlib.suppress(OSError, ValueError):  # no limit here ("max"), or no such file at the root
                limit = int((folder / names[0]).read_text())
                used = int((folder / names[1]).read_text())
                found.append((limit, limit - used + _page_cache(folder / "memory.stat", names[2])))
            if folder == top:
                break
            folder = folder.parent
    return found


def _control_groups() -> Iterator[tuple[Path, Path, tuple[str, str, str]]]:
    """The groups of this process that limit memory: their folder, the folder of the hierarchy's top, and file names."""
    try:
        lines, mounts = MEMBERSHIP.read_text().splitlines(), MOUNTS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            kind, names = "cgroup2", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            kind, names = "cgroup", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for mount in mounts:
            fields, _, rest = mount.partition(" - ")
            root, top = fields.split()[3:5]
            form, _, options = rest.split()[:3]
            if form == kind and (kind == "cgroup2" or "memory" in options.split(",")):
                inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
                folder = Path(top) / inside
                # A container may see another part of the hierarchy than its path tells: its own, at the top.
                yield (folder if folder.is_dir() else Path(top)), Path(top), names


def _page_cache(file: Path, name: str) -> int:
    """Bytes of a group's page cache that the kernel takes back before it kills."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{name} "):
            return int(line.split()[1])
    return 0
