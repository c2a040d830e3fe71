"""Host memory that is available to this process, limited by the machine and by its container.

A container is limited by control groups, of version 1 or 2. Control groups are nested, and each level can have its own
limit. The kernel kills a process that exceeds any of them, so allocations are checked against all limits first.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNTS = Path("/proc/self/mountinfo")


def available_memory() -> int:
    """Return the available host memory in bytes. The page cache counts as available, because the kernel reclaims it."""
    return max(0, min([psutil.virtual_memory().available, *(free for _, free in _limits())]))


def describe_memory() -> str:
    """Return a text on the available host memory and its limit, for error messages."""
    tightest = min(_limits(), key=lambda limit: limit[1], default=None)
    total, host = psutil.virtual_memory().total, psutil.virtual_memory().available
    if tightest and tightest[1] < host:
        limit, free = tightest
        return f"{max(0, free) / 2**30:.2f} GiB is available (the container's limit is {limit / 2**30:.2f} GiB)"
    return f"{host / 2**30:.2f} GiB is available (the machine has {total / 2**30:.2f} GiB)"


def _limits() -> list[tuple[int, int]]:
    """Return the limit and the free memory, in bytes, of each control group that limits this process."""
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
    """Yield, for each hierarchy that limits memory, this process's folder, the top folder, and the file names."""
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
                # In a container, the process's own group may be mounted at the top instead of at its path.
                yield (folder if folder.is_dir() else Path(top)), Path(top), names


def _page_cache(file: Path, name: str) -> int:
    """Return the bytes of a group's page cache that the kernel reclaims before it kills a process."""
    for line in file.read_text().splitlines():
        if line.startswith(f"{name} "):
            return int(line.split()[1])
    return 0
