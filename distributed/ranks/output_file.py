"""A rank's log file."""

import contextlib
import os
import sys
from pathlib import Path

LOG_BYTES = 2**20


class OutputFile:
    """Takes what this process writes to its standard streams, native libraries included. Kept from growing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open()

    def open(self) -> None:
        """Direct the standard streams to the end of the file, which its owner alone may read."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, sys.stdout.fileno())
        os.dup2(descriptor, sys.stderr.fileno())
        os.close(descriptor)

    def rotate(self) -> None:
        """Begin a new file where this one is full, and keep the one before."""
        with contextlib.suppress(OSError):  # somebody else took it away
            if self.path.stat().st_size > LOG_BYTES:
                self.path.replace(self.path.with_suffix(".old.log"))
                self.open()
