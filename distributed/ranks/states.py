"""The states of a rank group and of a rank, and the transitions between them.

A group:
starting -> ready <-> busy            normal operation
busy, ready -> recovering -> ready    a rank died or hung, and the group is restarted
starting, recovering -> failed        the group could not be started
ready, busy -> failed                 the group broke again; the next call restarts it
any -> stopped                        the group was stopped; the next call restarts it

A rank, which is never repaired but replaced:
starting -> ready <-> loading, busy, releasing
any except stopped -> failed          the rank died, hung or sent an invalid message
If a group has no processes, its ranks are shown as starting or stopped.
"""

from enum import Enum
from typing import TypeVar


class State(str, Enum):
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    RECOVERING = "recovering"
    FAILED = "failed"
    STOPPED = "stopped"


class RankState(str, Enum):
    STARTING = "starting"
    READY = "ready"
    LOADING = "loading"
    BUSY = "busy"
    RELEASING = "releasing"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def has_job(self) -> bool:
        """Whether the rank has a job, so it must make progress and answer."""
        return self in (RankState.LOADING, RankState.BUSY)


FOLLOWS: dict[State, frozenset[State]] = {
    State.STOPPED: frozenset({State.STARTING}),
    State.STARTING: frozenset({State.READY, State.FAILED, State.STOPPED}),
    State.READY: frozenset({State.BUSY, State.RECOVERING, State.FAILED, State.STOPPED}),
    State.BUSY: frozenset({State.READY, State.RECOVERING, State.FAILED, State.STOPPED}),
    State.RECOVERING: frozenset({State.READY, State.FAILED, State.STOPPED}),
    State.FAILED: frozenset({State.STARTING, State.STOPPED}),
}
RANK_FOLLOWS: dict[RankState, frozenset[RankState]] = {
    RankState.STARTING: frozenset({RankState.READY, RankState.FAILED}),
    RankState.READY: frozenset({RankState.LOADING, RankState.BUSY, RankState.RELEASING, RankState.FAILED}),
    RankState.LOADING: frozenset({RankState.READY, RankState.FAILED}),
    RankState.BUSY: frozenset({RankState.READY, RankState.FAILED}),
    RankState.RELEASING: frozenset({RankState.READY, RankState.FAILED}),
    RankState.FAILED: frozenset(),
    RankState.STOPPED: frozenset(),
}

S = TypeVar("S", State, RankState)


def follow(current: S, following: S) -> S:
    """Return `following`. Raises ValueError if there is no transition to it from `current`."""
    table, who = (FOLLOWS, "group") if isinstance(current, State) else (RANK_FOLLOWS, "rank")
    if following is not current and following not in table[current]:
        raise ValueError(f"A {who} that is {current.value} cannot become {following.value}.")
    return following
