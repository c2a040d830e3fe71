"""Folders for the logs of rank groups: one per start. The oldest folders are removed."""

import contextlib
import logging
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which removes no file that is open
    fcntl = None

log = logging.getLogger(__name__)

RUNS_KEPT = 16
"""Number of starts whose logs are kept. Logs of running groups are always kept."""
LAUNCHER_LOG = "launcher.log"
_RUN = re.compile(r"run-\d{8}-\d{6}-[a-z0-9_]{8}")
_FILE = re.compile(r"launcher\.log|rank-\d+(\.old)?\.log")
_refused: set[Path] = set()
"""Folders that could not be used, for which a warning was logged."""


def default_folder() -> Path | None:
    """Return the default folder for logs, in the user's cache; None for a user without a home."""
    try:
        return Path.home() / ".cache" / "hunyuanvideo15-distributed" / "logs"
    except RuntimeError:
        return None


def new_folder(logs: Path | None, private: Path) -> Path:
    """Create a folder in `logs` for the logs of one start, readable by its owner only, and remove the oldest folders.

    If `logs` cannot be used, which is logged once, create the folder in `private`, which is removed with the group.
    """
    if logs:
        try:
            return _new_run(logs)
        except OSError as error:
            if logs not in _refused:
                _refused.add(logs)
                log.warning("Logs cannot be written to %s (%s). Using a temporary folder.", logs, error)
    folder = private / "logs"
    folder.mkdir(mode=0o700)
    return folder


def open_launcher_log(folder: Path) -> int:
    """Create the launcher's log, readable by its owner only, and return its descriptor.

    The descriptor holds a lock while any process has it open. The lock shows that this group is running.
    """
    descriptor = os.open(folder / LAUNCHER_LOG, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    if fcntl:
        with contextlib.suppress(OSError):  # some network file systems do not support locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _new_run(logs: Path) -> Path:
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    runs = sorted((folder for folder in logs.iterdir() if _is_run(folder)), key=lambda folder: folder.name)
    for old in runs[: 1 - RUNS_KEPT]:
        if not _is_running(old):
            shutil.rmtree(old, ignore_errors=True)
    run = Path(tempfile.mkdtemp(prefix=time.strftime("run-%Y%m%d-%H%M%S-"), dir=logs))
    try:
        (run / LAUNCHER_LOG).write_bytes(bytes(2**20))  # fails if the disk is full
        (run / LAUNCHER_LOG).unlink()
    except OSError:
        shutil.rmtree(run, ignore_errors=True)
        raise
    return run


def _is_run(folder: Path) -> bool:
    """Return whether this module created the folder, by its full name and the names of its files."""
    if not _RUN.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    try:
        return all(_FILE.fullmatch(file.name) for file in folder.iterdir())
    except OSError:
        return False


def _is_running(run: Path) -> bool:
    """Return whether the group that writes to this folder is still running."""
    if not fcntl:
        return False
    try:
        with open(run / LAUNCHER_LOG, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
