"""The exchange of one job with the ranks: send it, wait for the answers, return or raise the result."""

import logging
import time
from collections.abc import Callable

from ..errors import Cancelled, GroupError, JobError, NoRoom, NotLoaded
from .processes import RankProcesses
from .protocol import TO_RANK, Cancel, Failed, Load, Run, decode, encode
from .states import RankState
from .status import RankStatus
from .supervisor import Supervisor

log = logging.getLogger(__name__)

GRACE_SECONDS = 3
"""Time limit for the other ranks to answer after one rank failed. After that they are considered hung."""
NOTIFY_SECONDS = 0.5
"""Minimum interval between reports of progress as a change of the group."""
POLL_SECONDS = 0.1
"""Interval between calls of a caller's callbacks."""


class MemoryShortage(Exception):
    """Ranks ran out of memory. `needed` and `free` are in bytes. smallest_plan: whether no other plan needs less."""

    def __init__(self, answer: Failed) -> None:
        super().__init__(answer.message)
        self.needed, self.free, self.smallest_plan = answer.needed, answer.free, answer.smallest_plan


class Caller:
    """One call that is queued or running: its callbacks, its time limit, and whether `cancel` or `stop` ended it.

    noun: name of the work in messages. limit: time limit, on the clock of `time.monotonic`. step: number of the job in
    a series, from 1, and the number of jobs in the series. make_room: frees device memory outside of the ranks; it is
    called at most once.
    """

    def __init__(
        self,
        noun: str,
        progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        notice: Callable[[str], None] | None = None,
        limit: float | None = None,
        step: tuple[int, int] | None = None,
        make_room: Callable[[], None] | None = None,
    ) -> None:
        self.noun, self.limit, self.step, self.make_room = noun, limit, step, make_room
        self.progress = progress or (lambda done, total: None)
        self.cancelled = cancelled or (lambda: False)
        self.notice = notice or (lambda message: None)
        self.stopped = False

    def check_stopped(self) -> None:
        """Raise Cancelled after `cancel` or `stop`."""
        if self.stopped:
            raise Cancelled

    def check(self) -> None:
        """Raise Cancelled if the call was cancelled, TimeoutError after its time limit, or what its callback raises."""
        self.check_stopped()
        if self.cancelled():
            raise Cancelled
        if self.limit is not None and time.monotonic() > self.limit:
            raise TimeoutError(f"The {self.noun} took longer than its timeout; it was cancelled.")

    def request_room(self) -> bool:
        """Call `make_room`, unless it was called before. Return whether there was one to call."""
        make_room, self.make_room = self.make_room, None
        if make_room is None:
            return False
        make_room()
        return True

    def report(self, message: str) -> None:
        """Log a message and show it to the user."""
        log.warning("%s", message)
        self.notice(message)


def exchange(supervisor: Supervisor, message: Load | Run, state: RankState, caller: Caller) -> None:
    """Send a job to the ranks, which changes their state to `state`, and return when all ranks have completed it.

    Raises GroupError, JobError, MemoryShortage, NotLoaded, NoRoom, Cancelled, TimeoutError, or what a callback raises.
    """
    try:
        frame = encode(message)
        decode(frame, TO_RANK)  # a rank closes the connection when it receives an invalid message
    except ValueError as error:
        raise JobError(f"The {caller.noun} cannot be sent to the ranks: {error}.") from error
    ranks = supervisor.take(message.id, state, caller.check)
    usable = False  # after an interruption, it is unknown which ranks have received the job
    try:
        ranks.send_frame(frame)
        stop = _await_answers(supervisor, ranks, message.id, caller)
        usable = _all_answered(ranks) and not any(record.answer.peers_waiting for record in _failures(ranks))
    finally:
        supervisor.give_back(ranks, usable)
    if stop:
        raise stop
    _judge(ranks)
    supervisor.confirm()
    total = sum(record.total for record in ranks.records)
    caller.progress(total, total)


def _await_answers(supervisor: Supervisor, ranks: RankProcesses, id: int, caller: Caller) -> BaseException | None:
    """Wait until all ranks have answered or cannot answer any more.

    Return the exception that ended the job before its completion, such as Cancelled; None if there was none.
    """
    stop, grace = None, None
    reported, reported_at = 0, time.monotonic()

    def settled() -> bool:
        return bool(ranks.broken) or _all_answered(ranks)

    while True:
        try:
            with ranks.changed:
                ranks.changed.wait_for(settled, POLL_SECONDS)
                done, total = sum(r.done for r in ranks.records), sum(r.total for r in ranks.records)
            if supervisor.ranks is not ranks:
                ranks.ended.wait()  # before that, they may write to the outputs
                return Cancelled()
            if settled():
                return stop
            if done != reported and time.monotonic() - reported_at > NOTIFY_SECONDS:
                reported, reported_at = done, time.monotonic()
                supervisor.notify()
            if stop is None:
                caller.check()
                caller.progress(done, total)
        except (Exception, KeyboardInterrupt) as error:  # a callback may raise KeyboardInterrupt
            if stop is None:
                ranks.send(Cancel(id))
            stop = error
        if _failures(ranks):
            grace = grace or time.monotonic() + GRACE_SECONDS
            if time.monotonic() > grace:
                return stop


def _all_answered(ranks: RankProcesses) -> bool:
    return all(record.answer for record in ranks.records)


def _failures(ranks: RankProcesses) -> list[RankStatus]:
    return [record for record in ranks.records if isinstance(record.answer, Failed)]


def _judge(ranks: RankProcesses) -> None:
    """Raise the exception for the ranks' answers, unless all ranks have completed the job."""
    if ranks.broken:
        raise GroupError(ranks.broken)
    failed = _failures(ranks)
    # If one rank fails, the others answer "cancelled". The cause is in the answer of the rank that failed.
    causes = [record for record in failed if record.answer.reason != "cancelled"]
    shortages = [record.answer for record in causes if record.answer.reason == "memory"]
    if shortages:
        raise MemoryShortage(min(shortages, key=lambda answer: answer.free))
    if any(record.answer.reason == "no room" for record in causes):
        raise NoRoom
    if causes:
        message = f"{str(causes[0]).capitalize()}: {causes[0].answer.message}"
        raise NotLoaded(message) if causes[0].answer.reason == "not loaded" else JobError(message)
    if failed:
        raise Cancelled
