"""Real processes on gloo that share forwards of the transformer, against one process that computes alone."""

import itertools
import multiprocessing
import multiprocessing.connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distributed.denoise.share import Share
from tests.ranks.denoise_ranks import CASES, LOST, WORLD, Case, work


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the ranks left what they computed, in all cases."""
    folder = tmp_path_factory.mktemp("share")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(WORLD)]
    try:
        for process in processes:
            process.start()
        running = {process.sentinel for process in processes}
        while running:
            ended = set(multiprocessing.connection.wait(running, timeout=100))
            assert ended, "the ranks wait for each other"
            running -= ended
            assert not any(process.exitcode for process in processes)
    finally:
        for process in processes:
            process.kill()
    return folder


def prediction(folder: Path, case: Case, branch: int) -> Tensor:
    """The rows of all ranks together."""
    ranks = case.layout.branches[branch].ranks
    return torch.cat([torch.load(folder / f"{case.name}.{branch}.{rank}") for rank in ranks])


def alone(folder: Path, case: Case, branch: int) -> Tensor:
    return prediction(folder, Case(1, case.branches, case.heads, case.latent), branch)


def error(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape and result.isfinite().all()
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_predict_what_one_process_predicts(folder, case):
    for branch in range(case.branches):
        assert error(prediction(folder, case, branch), alone(folder, case, branch)) < 1e-5


def test_the_branches_are_not_alike(folder):
    assert error(alone(folder, Case(2, 2), 0), alone(folder, Case(2, 2), 1)) > 0.01


def test_branches_with_a_rank_each_are_the_same_bits(folder):
    case = Case(2, 2)
    assert [split.ranks for split in case.layout.branches] == [(0,), (1,)]
    for branch in range(2):
        assert torch.equal(prediction(folder, case, branch), alone(folder, case, branch))


@pytest.mark.parametrize("case", LOST, ids=lambda case: case.name)
def test_a_rank_whose_tokens_are_lost_is_noticed(folder, case):
    for rank in range(case.ranks):
        rows, expected = (torch.load(folder / f"{which.name}.0.{rank}") for which in (case, Case(case.ranks)))
        assert error(rows, expected) > 1e-3


def test_the_cases_have_uneven_parts_ranks_without_heads_and_ranks_without_tokens():
    splits = list(itertools.chain(*(case.layout.branches for case in CASES)))
    assert any(len(set(split.tokens)) > 1 for split in splits) and any(len(set(split.heads)) > 1 for split in splits)
    assert any(0 in split.heads for split in splits) and any(0 in split.tokens for split in splits)


def test_a_share_with_others_needs_a_group():
    with pytest.raises(ValueError, match="2 ranks needs a group; group is None"):
        Share(Case(2).layout.branches[0])
