"""Keep a group's rank processes running: start them, replace them after a failure, and stop after repeated failures.

The supervisor has at most one `RankProcesses` that is not being ended. All decisions are made under one lock. The
result of a thread that starts processes is used only if its start is still current: a `stop` or another start in the
meantime takes precedence.
"""

import logging
import threading
from collections.abc import Callable

from ..errors import Cancelled, GroupError
from .processes import RankProcesses
from .states import RankState, State, follow

log = logging.getLogger(__name__)


class Supervisor:
    """The state of a group, and its processes if there are any.

    launch: creates new processes, which call the given function when their status changes. start_timeout: returns the
    time limit for their start in seconds. on_change: called, in any thread, when the group's status has changed.
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
        """Whether ranks that break while idle are replaced without a call. This happens once, until a job succeeds."""

    def notify(self) -> None:
        """Call `on_change`. Its exceptions are logged."""
        try:
            self._on_change()
        except Exception:
            log.exception("The on_change callback failed.")

    def start(self, check: Callable[[], None] = lambda: None) -> None:
        """Start processes in the background, unless there are any. `check` is called under the lock and may raise."""
        with self.lock:
            check()
            if self.state in (State.STOPPED, State.FAILED):
                self._may_auto_restart = True
                self._begin(State.STARTING)

    def wait_started(self) -> None:
        """Wait for a start in the background. Raises GroupError if the group did not start."""
        if thread := self._starting:
            thread.join()
        with self.lock:
            if self.state in (State.FAILED, State.STOPPED):
                raise GroupError(self.error or "The rank group was stopped while it was starting.")

    def take(self, job: int, rank_state: RankState, check: Callable[[], None]) -> RankProcesses:
        """Wait until the processes are ready, assign them `job`, and return them. `check` is called repeatedly.

        Raises GroupError if they do not start, Cancelled if the group is stopped, and what `check` raises.
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
        """Return the processes after a job. They are replaced if they are no longer usable."""
        with self.lock:
            if self.ranks is ranks and self.state is State.BUSY:
                if usable and not ranks.broken:
                    self._move(State.READY)
                else:
                    self._begin(State.RECOVERING)

    def confirm(self) -> None:
        """Record that a job succeeded: if the processes break while idle, they are replaced."""
        self._may_auto_restart = True

    def give_up(self, error: str) -> None:
        """Stop restarting the group, until a call needs it again."""
        with self.lock:
            if self.state is State.RECOVERING:
                self._fail(error)

    def stop(self) -> None:
        """End the processes, also those that are starting, and return when they have ended."""
        with self.lock:
            ranks, self.ranks = self.ranks, None
            self._move(State.STOPPED)
            starting = self._starting
        if ranks:
            ranks.end()
        if starting and starting is not threading.current_thread():
            starting.join()  # it ends the processes that it has started

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
        except RuntimeError as error:  # no thread can be started
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
        """Return whether this thread's start is still current. The lock is held."""
        starting = self.state in (State.STARTING, State.RECOVERING)
        return starting and self._starting is threading.current_thread()

    def _settle(self, ranks: RankProcesses | None, error: str | None) -> None:
        with self.lock:
            if self._is_current_start():
                self.ranks = ranks
                self._move(State.FAILED if error else State.READY, error)
        if ranks:
            self._changed(ranks)  # they may have broken in the meantime

    def _changed(self, ranks: RankProcesses) -> None:
        """Replace the processes if they broke while idle. Called, in any thread, when their status changes."""
        with self.lock:
            if ranks.broken and self.ranks is ranks and self.state is State.READY:
                if self._may_auto_restart:
                    self._may_auto_restart = False
                    self._begin(State.RECOVERING)
                else:
                    self._fail(ranks.broken)
        self.notify()

    def _fail(self, error: str) -> None:
        """End the processes and do not restart them before the next call. The lock is held."""
        ranks, self.ranks = self.ranks, None
        self._move(State.FAILED, error)
        if ranks:
            threading.Thread(target=ranks.end, name="hv15-end", daemon=True).start()
