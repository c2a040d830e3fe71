"""The interface of a task, which runs one kind of job on a rank, and the progress of the current job."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from .collective import Watch


class Task(Protocol):
    """One kind of work on this rank. A rank keeps one task for each kind of job that it has received.

    fields: parameters of the job. tensors: its inputs and outputs in shared memory, by name.
    """

    def load(self, fields: Mapping, tensors: Mapping[str, Tensor], watch: Watch) -> None:
        """Load the data that the fields name, unless it is loaded. Called to preload, and before each `run`.

        It must not contain a collective. If it raises on one rank, the job ends on all ranks. Raises NotLoaded if the
        job needs data that only another load can provide.
        """

    def run(self, fields: Mapping, tensors: Mapping[str, Tensor], watch: Watch) -> None:
        """Run this rank's part of a job and fill its part of the outputs. All ranks call it with the same fields.

        When it returns, the reported progress must equal the reported total. Raises Cancelled on all ranks together.
        """

    def fits(self, fields: Mapping, free: int) -> bool:
        """Return whether the job runs at full speed with `free` bytes in addition to the memory that this task uses."""

    def release(self) -> None:
        """Free the device memory."""


class JobWatch:
    """Progress and cancellation of the current job: written by the task, read by the heartbeat thread."""

    def __init__(self) -> None:
        self.state = (0, 0, 0)
        """Id, done and total in one value, so that a heartbeat never combines the id and progress of different jobs."""
        self.moved = 0
        """Counter of signs of progress. If it does not change for long, the controller considers the rank hung."""
        self._cancelled: set[int] = set()

    def begin(self, id: int) -> None:
        self.state = (id, 0, 0)
        self.moved += 1

    def progress(self, done: int, total: int) -> None:
        self.state = (self.state[0], done, total)
        self.moved += 1

    def cancel(self, id: int) -> None:
        self._cancelled.add(id)

    def cancelled(self) -> bool:
        self.moved += 1  # a task calls this after each step, also before its first progress
        return self.state[0] in self._cancelled
