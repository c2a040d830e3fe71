"""The states of a rank group and of a rank, and which may follow which.

A group:
starting -> ready <-> busy            the life of a healthy group
busy, ready -> recovering -> ready    a rank died or hung; the group is started again
starting, recovering -> failed        it did not come up
ready, busy -> failed                 it broke once too often, and waits to be asked
any -> stopped                        somebody stopped it; a later call starts it again

A rank, which is never repaired but replaced:
starting -> ready <-> loading, busy, releasing
any but stopped -> failed             it died, hung or was not understood
A group without processes shows its ranks as starting or stopped.
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
        """Whether the rank is to show progress and to answer."""
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
    """Return the following state. Raises ValueError where it may not follow."""
    table, who = (FOLLOWS, "group") if isinstance(current, State) else (RANK_FOLLOWS, "rank")
    if following is not current and following not in table[current]:
        raise ValueError(f"A {who} that is {current.value} cannot become {following.value}.")
    return following
