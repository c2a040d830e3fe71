"""What can go wrong with a decode, in two families.

JobError    this job failed, the group lives and its ranks stay warm: bad input, memory that does not suffice.
GroupError  the group broke: a rank died, hung, or never came up. The next call starts it anew.

Beside them stands `engine.Cancelled`, which is no error: somebody asked for it.
"""


class JobError(RuntimeError):
    """The job failed; the group lives."""


class GroupError(RuntimeError):
    """The group broke; the next call restarts it."""
