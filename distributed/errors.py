"""Every error of this package.

Exception
  RuntimeError
    JobError          the job failed and the group lives: bad input, or too little memory. Ranks stay warm.
    GroupError        the group broke: a rank died, hung or never started. The next call restarts the group.
  ValueError
    CheckpointError   a file or state dict that is not a checkpoint this package can use.
  Cancelled           the caller asked for the job to end. Not a failure.
  OutOfMemory         one rank has too little memory. Raised on ranks; the controller retries or raises JobError.
  NotLoaded           a rank lacks what the job builds on. Raised on ranks; the controller loads it and retries.
"""


class JobError(RuntimeError):
    """The job failed; the group lives."""


class GroupError(RuntimeError):
    """The group broke; the next call restarts it."""


class CheckpointError(ValueError):
    """The file is not a HunyuanVideo-1.5 checkpoint that can be used; the message says what is wrong with it."""


class Cancelled(Exception):
    """The caller asked for the job to end. The ranks stay ready."""


class OutOfMemory(Exception):
    """A rank has too little memory: `needed` and `free` are bytes, `held` says what others hold of the device's.

    smallest_plan: even the plan that takes the least memory needs that much. on_all_ranks: every rank raises this at
    the same place.
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
    """A rank lacks something that the job builds on, such as weights after a restart: the message names it."""
