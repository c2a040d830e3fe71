"""How a process ended: its exit code, from the launcher that waited for it to the controller that reports it."""

import json
import os
import signal
from pathlib import Path

FILE = "exit.json"
"""In the group's private folder: rank and exit code of the process that ended first, written by the launcher."""


def write_exit(folder: Path, rank: int, exit_code: int) -> None:
    """Record that `rank` was the first to end, with this exit code. Whoever reads sees all of it or nothing."""
    unfinished = folder / f"{FILE}.new"
    unfinished.write_text(json.dumps({"rank": rank, "exit_code": exit_code}))
    os.replace(unfinished, folder / FILE)


def read_exit(folder: Path, rank: int) -> int | None:
    """The exit code of `rank`, if it is recorded as the first to end."""
    try:
        found = json.loads((folder / FILE).read_text())
    except OSError:
        return None
    return found["exit_code"] if found["rank"] == rank else None


def describe_exit(exit_code: int) -> str:
    """What an exit code says, as the predicate of a sentence. A negative one is the signal, as in `subprocess`."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:  # a real-time signal
        return f"was killed by signal {-exit_code}"
    reason = ", often because the machine ran out of memory" if name == "SIGKILL" else ""
    return f"was killed by signal {-exit_code} ({name}){reason}"
