"""All transitions between the states of a group and of a rank, written out."""

import itertools

import pytest

from distributed.ranks.states import RankState, State, follow

GROUP = """
stopped -> starting
starting -> ready failed stopped
ready -> busy recovering failed stopped
busy -> ready recovering failed stopped
recovering -> ready failed stopped
failed -> starting stopped
"""
RANK = """
starting -> ready failed
ready -> loading busy releasing failed
loading -> ready failed
busy -> ready failed
releasing -> ready failed
failed ->
stopped ->
"""


def allowed(states: type, lines: str) -> set[tuple]:
    pairs = {(state, state) for state in states}
    for line in lines.split("\n")[1:-1]:
        before, _, after = line.partition(" ->")
        pairs |= {(states(before), states(name)) for name in after.split()}
    return pairs


PAIRS = [pair for states in (State, RankState) for pair in itertools.product(states, states)]
ALLOWED = [allowed(State, GROUP), allowed(RankState, RANK)]


@pytest.mark.parametrize(("current", "following"), PAIRS)
def test_only_the_listed_transitions_are_possible(current, following):
    if (current, following) in ALLOWED[isinstance(current, RankState)]:
        assert follow(current, following) is following
    else:
        with pytest.raises(ValueError, match=f"is {current.value} cannot become {following.value}"):
            follow(current, following)


def test_the_panel_has_a_text_for_every_state():
    from pathlib import Path

    panel = (Path(__file__).resolve().parents[2] / "web" / "panel.mjs").read_text()
    texts = [part.split("}")[0] for part in panel.split("states: {")[1:]]
    assert len(texts) == 2
    for text in texts:
        for state in {state.value for states in (State, RankState) for state in states}:
            assert f"{state}:" in text, state
