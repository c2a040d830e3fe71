"""The exceptions of this package.

Exception
  RuntimeError
    JobError          The job failed because of invalid input or insufficient memory. The ranks keep running.
    GroupError        The group broke: a rank died, hung or never started. The next call restarts the group.
                      A rank that raises it exits.
  ValueError
    CheckpointError   A file or state dict is not a checkpoint that this package supports.
  Cancelled           The caller cancelled the job. This is not a failure.
  OutOfMemory         A rank has insufficient memory. Raised on ranks; the controller retries or raises JobError.
  NotLoaded           A rank has not loaded data that the job needs. Raised on ranks; the controller loads and retries.
  NoRoom              Free memory is not enough for full speed. Raised on ranks; the controller makes room and retries.
"""


class JobError(RuntimeError):
    """The job failed. The ranks keep running."""


class GroupError(RuntimeError):
    """The group broke. The next call restarts it."""


class CheckpointError(ValueError):
    """The file is not a supported HunyuanVideo-1.5 checkpoint. The message says what is wrong with it."""


class Cancelled(Exception):
    """The caller cancelled the job. The ranks stay ready."""


class OutOfMemory(Exception):
    """A rank has insufficient memory. `needed` and `free` are in bytes; `held` describes the use by other processes.

    smallest_plan: whether no other plan needs less memory. on_all_ranks: whether every rank raises this error at the
    same point.
    """

    def __init__(
        self,
        needed: int,
        free: int,
        device: object,
        held: str = "",
        *,
        noun: str,
        smallest_plan: bool,
        on_all_ranks: bool,
    ) -> None:
        super().__init__(
            f"Not enough memory on {device}: the {noun} needs {needed / 2**30:.2f} GiB, "
            f"{free / 2**30:.2f} GiB is available{held and f' ({held})'}."
        )
        self.needed, self.free, self.smallest_plan, self.on_all_ranks = needed, free, smallest_plan, on_all_ranks


class NotLoaded(Exception):
    """A rank has not loaded data that the job needs, such as weights after a restart. The message names the data."""


class NoRoom(Exception):
    """The free device memory of a rank is not enough to run the job at full speed."""
