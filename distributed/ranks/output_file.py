"""A rank's log file."""

import contextlib
import os
import sys
from pathlib import Path

LOG_BYTES = 2**20
"""Size in bytes above which a new log file is started."""


class OutputFile:
    """Redirects this process's standard streams, including output of native libraries, to a file of limited size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open()

    def open(self) -> None:
        """Redirect the standard streams to the end of the file, which only its owner can read."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, sys.stdout.fileno())
        os.dup2(descriptor, sys.stderr.fileno())
        os.close(descriptor)

    def rotate(self) -> None:
        """If the file exceeds LOG_BYTES, start a new one and keep the previous one."""
        with contextlib.suppress(OSError):  # the file was removed by another program
            if self.path.stat().st_size > LOG_BYTES:
                self.path.replace(self.path.with_suffix(".old.log"))
                self.open()
