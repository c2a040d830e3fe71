"""Exit codes of ranks: the launcher writes the code to a file, and the controller reads and reports it."""

import json
import os
import signal
from pathlib import Path

FILE = "exit.json"
"""File in the group's private folder with the rank and exit code of the process that ended first."""


def write_exit(folder: Path, rank: int, exit_code: int) -> None:
    """Record that `rank` was the first to end, with this exit code. The file is written atomically."""
    unfinished = folder / f"{FILE}.new"
    unfinished.write_text(json.dumps({"rank": rank, "exit_code": exit_code}))
    os.replace(unfinished, folder / FILE)


def read_exit(folder: Path, rank: int) -> int | None:
    """Return the exit code of `rank` if it is recorded as the first to end; None otherwise."""
    try:
        found = json.loads((folder / FILE).read_text())
    except OSError:
        return None
    return found["exit_code"] if found["rank"] == rank else None


def describe_exit(exit_code: int) -> str:
    """Describe an exit code as the predicate of a sentence. A negative code is a signal, as in `subprocess`."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:  # a real-time signal
        return f"was killed by signal {-exit_code}"
    reason = ", often because the machine ran out of memory" if name == "SIGKILL" else ""
    return f"was killed by signal {-exit_code} ({name}){reason}"
