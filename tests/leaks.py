"""Processes that a test has left behind."""

import contextlib
from collections.abc import Iterable

import psutil


def foreign_processes(groups: Iterable) -> list[str]:
    """Return a description of each launcher and rank that this process started and that belongs to none of the groups.

    A ComfyUI server that this process started has launchers and ranks of its own, which are not included.
    """
    pids = {rank["pid"] for group in groups for rank in group.status()["ranks"]}
    left = []
    for launcher in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended
            for process in filter(_is_of_a_group, [launcher, *launcher.children()] if _is_of_a_group(launcher) else []):
                if process.pid not in pids and pids.isdisjoint(child.pid for child in process.children()):
                    left.append(f"process {process.pid}: {' '.join(process.cmdline())}")
    return left


def _is_of_a_group(process: psutil.Process) -> bool:
    return "bootstrap.py" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE


def servers() -> set[int]:
    """Return the process ids of the ComfyUI servers that this process started and that still run."""
    found = set()
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "main.py" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found
