"""What a rank is asked to do: one task for each kind of job, and what is known of the job in hand."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from .collective import Watch


class Task(Protocol):
    """One kind of work on this rank. A rank keeps one task for each kind that it was asked for.

    `fields` is what the job tells the task, `tensors` are the job's inputs and outputs by name, in shared memory.
    """

    def load(self, fields: Mapping, tensors: Mapping[str, Tensor], watch: Watch) -> None:
        """Load what the fields name, unless it is loaded. Called ahead of time, and before each `run` with its fields.

        It contains no collective. Where it raises on one rank, the job ends on all of them. Raises NotLoaded where a
        run builds on something that only another load can bring.
        """

    def run(self, fields: Mapping, tensors: Mapping[str, Tensor], watch: Watch) -> None:
        """Do this rank's part of a job and fill its part of the outputs. All ranks call it with the same fields.

        All that it reports as total is done when it returns. Raises Cancelled on all ranks at once.
        """

    def fits(self, fields: Mapping, free: int) -> bool:
        """Return whether the job runs at full speed with `free` bytes of the device beside what this task holds."""

    def release(self) -> None:
        """Give the device memory back."""


class JobWatch:
    """What is known of the job in hand: written by the task, read by the beat."""

    def __init__(self) -> None:
        self.state = (0, 0, 0)
        """Id, done and total: one value, so that a beat never pairs a job with the progress of another."""
        self.moved = 0
        """Grows with every sign of progress; a controller that sees no change for long knows that the rank hangs."""
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
        self.moved += 1  # a task asks between its steps, which may be long before the first result
        return self.state[0] in self._cancelled
