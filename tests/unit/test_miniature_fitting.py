"""The loop of the miniature's training, and its steps as CUDA graphs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from miniature.training import fitting, graphs
from miniature.training.fitting import Schedule, fit
from miniature.training.graphs import Graphs

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="requires CUDA")),
]


class StandIn:
    """In place of CUDA graphs: a replay computes the step with the tensors that were held at the capture."""

    def __init__(self) -> None:
        self.captured, self.warm = [], 0

    def warm_up(self, step: Callable, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        self.warm += 1
        return step(*inputs)

    def __call__(self, step: Callable, inputs: tuple[Tensor, ...]) -> Callable:
        held = [one.clone() for one in inputs]
        self.captured.append([one.shape for one in inputs])

        def replay(*inputs: Tensor) -> dict[str, Tensor]:
            for place, value in zip(held, inputs, strict=True):
                place.copy_(value)
            return step(*held)

        return replay


class Failing(StandIn):
    def __call__(self, step: Callable, inputs: tuple[Tensor, ...]) -> Callable:
        raise RuntimeError("operation not permitted when stream is capturing")


def quadratic(device: str = "cpu") -> tuple[nn.Module, Callable, Callable]:
    """Return a model of one weight vector, the draw of inputs of two sizes, and the distance of products to sums."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).to(device)

    def draw(number: int) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(number)
        return (torch.randn(3 + number % 2, 4, generator=generator).to(device),)

    return model, draw, lambda rows: {"loss": (model(rows) - rows.sum(1, keepdim=True)).square().mean()}


@pytest.fixture(params=["plain", "graphs"])
def stand_in(request, monkeypatch) -> list[StandIn]:
    """Run steps plainly, or with stand-ins for CUDA graphs, which are returned."""
    made = []

    def prepared(step: Callable, device: torch.device, log: Callable) -> Callable:
        made.append(StandIn())
        return Graphs(step, log, made[-1])

    if request.param == "graphs":
        monkeypatch.setattr(fitting, "prepared", prepared)
    return made


def test_steps_of_each_size_are_captured_once_and_give_the_same_results():
    capture, lines = StandIn(), []
    run = Graphs(lambda a, b: {"sum": a.sum() + b.sum()}, lines.append, capture)
    for number in range(1, 7):
        for size in (2, 3):
            a, b = torch.full((size,), float(number)), torch.full((size, 1), 10.0)
            assert run(a, b)["sum"] == size * (number + 10)
    assert capture.captured == [[(2,), (2, 1)], [(3,), (3, 1)]] and capture.warm == 2 * graphs.WARM_STEPS
    assert lines == []


def test_a_capture_that_fails_is_logged_once_and_the_steps_go_on():
    lines = []
    run = Graphs(lambda a: {"sum": a.sum()}, lines.append, Failing())
    for number in range(12):
        assert run(torch.full((2 + number % 2,), 3.0))["sum"] == 3 * (2 + number % 2)
    assert len(lines) == 1 and "not permitted when stream is capturing" in lines[0]


@pytest.mark.parametrize("device", DEVICES)
def test_training_brings_weights_and_averaged_weights_to_the_minimum(device, tmp_path):
    model, draw, losses = quadratic(device)
    lines = []
    averaged, figures = fit("x", model, draw, losses, Schedule(600, 0.1, 400, decay=0.9), tmp_path, lines.append)
    assert figures["steps"] == 400
    assert (model.weight - 1).abs().max() < 0.05 and (averaged.weight - 1).abs().max() < 0.05
    assert not any("graphs" in line for line in lines)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires CUDA")
def test_cuda_graphs_train_as_steps_without_them(tmp_path, monkeypatch):
    results = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(fitting, "prepared", lambda step, device, log: step)
        folder = tmp_path / str(plain)
        folder.mkdir()
        model, draw, losses = quadratic("cuda")
        averaged, _ = fit("x", model, draw, losses, Schedule(600, 0.05, 60), folder, lambda line: None)
        results.append((model.weight.detach(), averaged.weight))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_stage_that_was_interrupted_continues_where_it_was(device, tmp_path, monkeypatch, stand_in):
    def run(folder: Path, most_steps: int, until: int | None = None) -> Tensor:
        model, draw, losses = quadratic(device)

        def interrupted(number: int) -> tuple[Tensor]:
            if number == until:
                raise KeyboardInterrupt
            return draw(number)

        averaged, figures = fit(
            "x", model, interrupted, losses, Schedule(600, 0.05, most_steps), folder, lambda line: None
        )
        assert figures["steps"] == most_steps
        return averaged.weight

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    expected = run(whole, 30)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "LOG_SECONDS", 0.0)
        patch.setattr(fitting, "CHECKPOINT_SECONDS", 0.0)  # a checkpoint after each step
        with pytest.raises(KeyboardInterrupt):
            run(cut, 30, until=22)
    assert torch.load(cut / "x.pt", weights_only=True)["state"]["step"] > 8
    assert torch.allclose(run(cut, 30), expected, atol=1e-6)


def test_training_ends_when_its_time_is_over(tmp_path):
    _, figures = fit("x", *quadratic(), Schedule(0.2, 0.05), tmp_path, lambda line: None)
    assert figures["steps"] >= 1 and figures["seconds"] >= 0.2


def test_a_loss_that_is_not_finite_returns_to_the_last_checkpoint(tmp_path, stand_in):
    model, draw, losses = quadratic()
    lines, failed = [], []

    def draw_once(number: int) -> tuple[Tensor]:
        if number == 11 and not failed:
            failed.append(number)
            return (draw(number)[0] * float("nan"),)
        return draw(number)

    averaged, figures = fit("x", model, draw_once, losses, Schedule(600, 0.05, 20), tmp_path, lines.append)
    assert any("not finite; back to step 0" in line for line in lines)
    assert figures["steps"] == 20 and torch.isfinite(averaged.weight).all()
    if stand_in:  # graphs are made again, because loading replaces the optimizer's tensors
        assert len(stand_in) == 2 and all(len(one.captured) == 2 for one in stand_in)


def test_a_loss_that_is_never_finite_ends_the_training(tmp_path):
    model, draw, losses = quadratic()
    with pytest.raises(RuntimeError, match="not finite after five attempts"):
        fit(
            "x",
            model,
            draw,
            lambda rows: {"loss": losses(rows)["loss"] * float("nan")},
            Schedule(600, 0.1, 3),
            tmp_path,
            lambda line: None,
        )
