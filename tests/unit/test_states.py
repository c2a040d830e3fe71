"""Which state of a group may follow which: all pairs."""

import itertools

import pytest

from distributed.ranks.states import FOLLOWS, State, follow

PAIRS = list(itertools.product(State, State))


@pytest.mark.parametrize(("current", "following"), PAIRS)
def test_only_what_the_table_allows_may_follow(current, following):
    if following is current or following in FOLLOWS[current]:
        assert follow(current, following) is following
    else:
        with pytest.raises(ValueError, match=current.value):
            follow(current, following)


def test_every_state_can_be_stopped_and_reached():
    assert all(State.STOPPED in FOLLOWS[state] for state in State if state is not State.STOPPED)
    assert {state for following in FOLLOWS.values() for state in following} == set(State)
