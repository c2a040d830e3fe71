"""Every error of this package.

Exception
  RuntimeError
    JobError          the job failed and the group lives: bad input, or too little memory. Ranks stay warm.
    GroupError        the group broke: a rank died, hung or never started. The next call restarts the group.
  ValueError
    CheckpointError   a file or state dict that is not a checkpoint this package can use.
  Cancelled           the caller asked for the job to end. Not a failure.
  OutOfMemory         one rank has too little memory. Raised on ranks; the controller retries or raises JobError.
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
    """A rank has too little memory: `needed` and `free` are bytes, `where` names the device and what others hold.

    least: even the smallest plan needs that much. on_all_ranks: every rank raises it at the same place.
    """

    def __init__(self, needed: int, free: int, where: str, *, least: bool, on_all_ranks: bool) -> None:
        super().__init__(f"The decode needs {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB can be used{where}.")
        self.needed, self.free, self.least, self.on_all_ranks = needed, free, least, on_all_ranks
