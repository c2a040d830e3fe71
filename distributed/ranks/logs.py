"""Folders for the logs of rank groups: one for each start, the oldest ones removed."""

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
"""Logs of this many starts are kept, besides those of groups that live."""
LAUNCHER_LOG = "launcher.log"
_RUN = re.compile(r"run-\d{8}-\d{6}-[a-z0-9_]{8}")
_FILE = re.compile(r"launcher\.log|rank-\d+(\.old)?\.log")
_refused: set[Path] = set()
"""Folders whose refusal was logged."""


def default_folder() -> Path | None:
    """Where logs go that nobody chose a folder for: the user's cache. None for a user without a home."""
    try:
        return Path.home() / ".cache" / "hunyuanvideo15-distributed" / "logs"
    except RuntimeError:
        return None


def new_folder(logs: Path | None, private: Path) -> Path:
    """A new folder in `logs` for the logs of one start, for its owner alone; the oldest ones of many are removed.

    Where `logs` cannot be used, which is logged once, the folder is `private`, and is gone with the group.
    """
    if logs:
        try:
            return _new_run(logs)
        except OSError as error:
            if logs not in _refused:
                _refused.add(logs)
                log.warning("Logs cannot be written to %s (%s). They go to a temporary folder.", logs, error)
    folder = private / "logs"
    folder.mkdir(mode=0o700)
    return folder


def open_launcher_log(folder: Path) -> int:
    """A descriptor of the launcher's new log, for its owner alone.

    It holds a lock for as long as a process has it open, which tells others that this group lives.
    """
    descriptor = os.open(folder / LAUNCHER_LOG, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    if fcntl:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _new_run(logs: Path) -> Path:
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    runs = sorted((folder for folder in logs.iterdir() if _is_run(folder)), key=lambda folder: folder.name)
    for old in runs[: 1 - RUNS_KEPT]:
        if not _lives(old):
            shutil.rmtree(old, ignore_errors=True)
    run = Path(tempfile.mkdtemp(prefix=time.strftime("run-%Y%m%d-%H%M%S-"), dir=logs))
    try:
        (run / LAUNCHER_LOG).write_bytes(bytes(2**20))  # fails where the disk is full
        (run / LAUNCHER_LOG).unlink()
    except OSError:
        shutil.rmtree(run, ignore_errors=True)
        raise
    return run


def _is_run(folder: Path) -> bool:
    """Whether a folder is one of ours: by its whole name, and by what is in it."""
    if not _RUN.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    try:
        return all(_FILE.fullmatch(file.name) for file in folder.iterdir())
    except OSError:
        return False


def _lives(run: Path) -> bool:
    """Whether a process of the group that writes to this folder is still there."""
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
