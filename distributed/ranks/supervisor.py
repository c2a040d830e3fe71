"""Keeps a group's rank processes running: starts them, replaces those that broke, and gives up when that is no use.

`RankProcesses` live from one start to one end; the supervisor has at most one set of them that is not being ended. All
decisions are taken under one lock, and a thread that starts or ends processes takes effect only while the state still
asks for it: a `stop`, or another start, that came in between wins.
"""

import logging
import threading
from collections.abc import Callable

from ..errors import Cancelled, GroupError
from .processes import RankProcesses
from .states import RankState, State, follow

log = logging.getLogger(__name__)


class Supervisor:
    """The state of a group, and its processes while it has some.

    launch makes new processes, which call what they are given whenever their status changes. start_timeout tells how
    many seconds they have to come up. on_change is called, in any thread, when the status of the group has changed.
    """

    def __init__(
        self,
        launch: Callable[[Callable[[], None]], RankProcesses],
        start_timeout: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self._launch, self._start_timeout, self._on_change = launch, start_timeout, on_change
        self.lock = threading.RLock()
        self.state = State.STOPPED
        self.error: str | None = None
        self.ranks: RankProcesses | None = None
        self._starting: threading.Thread | None = None
        self._may_auto_restart = True
        """Whether ranks that break while idle are replaced without a call: once, until they have done a job."""

    def notify(self) -> None:
        """Report that the status has changed."""
        try:
            self._on_change()
        except Exception:
            log.exception("The on_change callback failed.")

    def start(self, check: Callable[[], None] = lambda: None) -> None:
        """Start processes in the background, unless there are some. What `check` raises under the lock prevents it."""
        with self.lock:
            check()
            if self.state in (State.STOPPED, State.FAILED):
                self._may_auto_restart = True
                self._begin(State.STARTING)

    def wait_started(self) -> None:
        """Wait for a start in the background. Raises GroupError where the group did not come up."""
        if thread := self._starting:
            thread.join()
        with self.lock:
            if self.state in (State.FAILED, State.STOPPED):
                raise GroupError(self.error or "The rank group was stopped while it started.")

    def take(self, job: int, rank_state: RankState, check: Callable[[], None]) -> RankProcesses:
        """Return the processes, once they are up, with `job` in hand. `check` is called while that takes its time.

        Raises GroupError where they do not come up, Cancelled where the group was stopped, and what `check` raises.
        """
        while True:
            check()
            with self.lock:
                if self.state is State.READY and not self.ranks.broken:
                    self.state = follow(self.state, State.BUSY)
                    ranks = self.ranks
                    ranks.begin(job, rank_state)
                    break
                if self.state is State.STOPPED:
                    raise Cancelled
                if self.state is State.FAILED:
                    raise GroupError(self.error)
                starting = self._starting
            starting.join(0.1)
        self.notify()
        return ranks

    def give_back(self, ranks: RankProcesses, usable: bool) -> None:
        """Take the processes back after a job; replace them if they are not usable any more."""
        with self.lock:
            if self.ranks is ranks and self.state is State.BUSY:
                if usable and not ranks.broken:
                    self._move(State.READY)
                else:
                    self._begin(State.RECOVERING)

    def confirm(self) -> None:
        """The processes have done a job: when they break while idle, they are replaced."""
        self._may_auto_restart = True

    def give_up(self, error: str) -> None:
        """Stop trying to bring the group up, until a call needs it again."""
        with self.lock:
            if self.state is State.RECOVERING:
                self._fail(error)

    def stop(self) -> None:
        """End the processes, and what starts them. Returns when they have ended."""
        with self.lock:
            ranks, self.ranks = self.ranks, None
            self._move(State.STOPPED)
            starting = self._starting
        if ranks:
            ranks.end()
        if starting and starting is not threading.current_thread():
            starting.join()  # it ends what it has started

    def _move(self, state: State, error: str | None = None) -> None:
        self.state, self.error = follow(self.state, state), error
        self.notify()

    def _begin(self, state: State) -> None:
        """Replace the processes, if there are any, in the background. The lock is held."""
        old, self.ranks = self.ranks, None
        self._starting = threading.Thread(target=self._bring_up, args=(old,), name="hv15-start", daemon=True)
        self._move(state)
        try:
            self._starting.start()
        except RuntimeError as error:  # there can be no more threads
            self._starting = None
            if old:
                old.end()
            self._fail(f"The rank group cannot be started: {error}.")

    def _bring_up(self, old: RankProcesses | None) -> None:
        if old:
            old.end()
        with self.lock:
            if not self._is_current_start():
                return
        try:
            ranks = self._launch(lambda: self._changed(ranks))
        except Exception as error:
            message = error.strerror if isinstance(error, OSError) else error
            self._settle(None, f"The rank group cannot be started: {message}.\n{error!r}")
            return
        with self.lock:
            if self._is_current_start():
                self.ranks = ranks
        if self.ranks is ranks and ranks.wait_ready(self._start_timeout()):
            self._settle(ranks, None)
        else:
            ranks.end()
            self._settle(None, f"The rank group did not start: {ranks.broken}")

    def _is_current_start(self) -> bool:
        """Return whether what this thread starts is still wanted. The lock is held."""
        starting = self.state in (State.STARTING, State.RECOVERING)
        return starting and self._starting is threading.current_thread()

    def _settle(self, ranks: RankProcesses | None, error: str | None) -> None:
        with self.lock:
            if self._is_current_start():
                self.ranks = ranks
                self._move(State.FAILED if error else State.READY, error)
        if ranks:
            self._changed(ranks)  # they may have broken just now

    def _changed(self, ranks: RankProcesses) -> None:
        """The processes changed, in some thread. Replace idle ones that broke."""
        with self.lock:
            if ranks.broken and self.ranks is ranks and self.state is State.READY:
                if self._may_auto_restart:
                    self._may_auto_restart = False
                    self._begin(State.RECOVERING)
                else:
                    self._fail(ranks.broken)
        self.notify()

    def _fail(self, error: str) -> None:
        """Give up until the next call. The lock is held."""
        ranks, self.ranks = self.ranks, None
        self._move(State.FAILED, error)
        if ranks:
            threading.Thread(target=ranks.end, name="hv15-end", daemon=True).start()
