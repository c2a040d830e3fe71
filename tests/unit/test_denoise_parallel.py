"""The layout of a denoising step: coverage of tokens and heads, matching exchange sizes, and the lower cost."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distributed.denoise.parallel import Layout, Split, cost, parts, plan

SIZES = {"ranks": st.integers(1, 24), "branches": st.integers(1, 2), "tokens": st.integers(1, 200_000)}
SIZES |= {"heads": st.integers(1, 32), "head_dim": st.sampled_from([16, 64, 128])}
TOKENS = {"480x848x33": 14_310, "480x848x121": 49_290, "720x1280x121": 111_600}


@given(total=st.integers(0, 10_000), count=st.integers(1, 64))
def test_parts_equal_those_of_tensor_split(total, count):
    assert parts(total, count) == tuple(len(part) for part in torch.empty(total).tensor_split(count))


@given(**SIZES)
def test_every_token_and_head_of_a_branch_belongs_to_one_rank(ranks, branches, tokens, heads, head_dim):
    layout = plan(ranks, branches, tokens, heads, head_dim)
    assert len(layout.branches) == branches
    for split in layout.branches:
        indices = range(len(split.ranks))
        assert list(itertools.chain(*map(split.token_range, indices))) == list(range(tokens))
        assert split.total_heads == heads
        if split.gathers:
            assert len(split.ranks) <= 2 and all(split.head_range(index) == range(heads) for index in indices)
        else:
            assert list(itertools.chain(*map(split.head_range, indices))) == list(range(heads))
            assert max(split.heads) == -(-heads // len(split.ranks))
    assert set().union(*(split.ranks for split in layout.branches)) == set(range(ranks))  # no rank idles


@given(**SIZES)
def test_send_sizes_match_receive_sizes(ranks, branches, tokens, heads, head_dim):
    for split in plan(ranks + 2, branches, tokens, heads, head_dim).branches:
        if split.gathers:
            continue
        exchanges = [split.exchange(index, head_dim) for index in range(len(split.ranks))]
        for sender, receiver in itertools.product(range(len(exchanges)), repeat=2):
            assert exchanges[sender].send[receiver] == exchanges[receiver].receive[sender]
            assert exchanges[sender].reverse.send[receiver] == exchanges[receiver].reverse.receive[sender]
        for index, exchange in enumerate(exchanges):
            assert sum(exchange.send) == split.tokens[index] * heads * head_dim
            assert sum(exchange.receive) == tokens * split.heads[index] * head_dim


@given(**SIZES)
def test_ranks_compute_one_branch_each_or_both_in_the_same_order(ranks, branches, tokens, heads, head_dim):
    layout = plan(ranks, branches, tokens, heads, head_dim)
    work = [layout.of(rank) for rank in range(ranks)]
    assert all(len(branches_of) == 1 for branches_of in work) or set(work) == {tuple(range(branches))}
    assert len(layout.groups) == len({split.ranks for split in layout.branches})


@given(**SIZES)
def test_the_cheaper_of_the_two_layouts_is_chosen(ranks, branches, tokens, heads, head_dim):
    chosen = cost(plan(ranks, branches, tokens, heads, head_dim), head_dim)
    in_turn = Layout((Split.of(tuple(range(ranks)), tokens, heads),) * branches)
    assert chosen <= cost(in_turn, head_dim)
    if branches == 2 and ranks > 1:
        sizes = ranks - ranks // 2, ranks // 2
        halves = [Split.of(tuple(range(size)), tokens, heads) for size in sizes]
        assert chosen <= max(cost(Layout((half,)), head_dim) for half in halves)


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_guidance_uses_halves_of_an_even_number_of_ranks_and_runs_in_turn_on_3_or_5(tokens):
    for ranks in (2, 4, 6, 8):
        first, second = plan(ranks, 2, tokens, 16).branches
        assert first.ranks + second.ranks == tuple(range(ranks)) and len(first.ranks) == len(second.ranks)
    for ranks in (3, 5):
        assert [split.ranks for split in plan(ranks, 2, tokens, 16).branches] == [tuple(range(ranks))] * 2


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("branches", [1, 2])
def test_adding_a_rank_never_increases_the_cost(tokens, branches):
    costs = [cost(plan(ranks, branches, tokens, 16), 128) for ranks in range(1, 17)]
    assert costs == sorted(costs, reverse=True)


def test_ranks_beyond_the_last_head_keep_their_tokens():
    (split,) = plan(5, 1, 100, 3).branches
    assert split.heads == (1, 1, 1, 0, 0) and split.tokens == (20,) * 5
    assert plan(4, 1, 2, 3).branches[0].tokens == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 0}, "ranks is 0; it must be at least 1."),
        ({"tokens": 0}, "tokens is 0; it must be at least 1."),
        ({"heads": -1}, "heads is -1; it must be at least 1."),
        ({"branches": 3}, "branches is 3; a step has 1, or 2 with guidance."),
    ],
)
def test_invalid_sizes_are_refused(change, message):
    with pytest.raises(ValueError) as refusal:
        plan(**{"ranks": 2, "branches": 2, "tokens": 10, "heads": 4} | change)
    assert str(refusal.value) == message
