"""The states of a rank group, and which may follow which.

starting -> ready <-> busy            the life of a healthy group
busy, ready -> recovering -> ready    a rank died or hung; the group is started again
starting, recovering -> failed        it did not come up
ready, busy -> failed                 it broke once too often, and waits to be asked
any -> stopped                        somebody stopped it; a later call starts it again
"""

from enum import Enum


class State(str, Enum):
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    RECOVERING = "recovering"
    FAILED = "failed"
    STOPPED = "stopped"


FOLLOWS: dict[State, frozenset[State]] = {
    State.STOPPED: frozenset({State.STARTING}),
    State.STARTING: frozenset({State.READY, State.FAILED, State.STOPPED}),
    State.READY: frozenset({State.BUSY, State.RECOVERING, State.FAILED, State.STOPPED}),
    State.BUSY: frozenset({State.READY, State.RECOVERING, State.FAILED, State.STOPPED}),
    State.RECOVERING: frozenset({State.READY, State.FAILED, State.STOPPED}),
    State.FAILED: frozenset({State.STARTING, State.STOPPED}),
}


def follow(current: State, following: State) -> State:
    """The following state, or ValueError where it may not follow."""
    if following is not current and following not in FOLLOWS[current]:
        raise ValueError(f"A group that is {current.value} cannot become {following.value}.")
    return following
