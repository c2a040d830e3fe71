"""The training loop that both stages share: schedule by time, averaged weights, checkpoints, log lines.

The learning rate rises over the first steps and falls to zero along a cosine of the time spent, so that a stage ends in
time on any GPU. A checkpoint holds everything that the loop needs to go on in another process. A GPU computes a step as
one CUDA graph, because launching its several thousand kernels would take longer than the kernels (see `graphs.py`).
"""

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .graphs import prepared

WARM_UP = 200
"""Steps in which the learning rate rises."""
LOG_SECONDS, CHECKPOINT_SECONDS = 5.0, 45.0


@dataclass(frozen=True)
class Schedule:
    """How long a model is trained, and how fast."""

    seconds: float
    """Time for all steps together, over all processes that work on it."""
    rate: float
    """Highest learning rate."""
    most_steps: int | None = None
    decay: float = 0.995
    """Decay per step of the averaged weights."""


def fit(
    name: str,
    model: nn.Module,
    draw: Callable[[int], tuple[Tensor, ...]],
    losses: Callable[..., dict[str, Tensor]],
    schedule: Schedule,
    folder: Path,
    log: Callable[[str], None],
    evaluate: Callable[[nn.Module], str] = lambda model: "",
) -> tuple[nn.Module, dict[str, float]]:
    """Train a model and return it with averaged weights, and what was measured.

    draw: returns the tensors of the step with the given number, on the model's device.
    losses: receives these tensors, and returns those of which "loss" is minimised. It must fit `Graphs`.
    evaluate: says how good the averaged model is, whenever a checkpoint is written. If the loss is not finite, the last
    checkpoint is loaded and the learning rate halved. Raises RuntimeError if that happens five times.
    """
    device = next(model.parameters()).device
    averaged = copy.deepcopy(model).requires_grad_(False)
    average = get_ema_multi_avg_fn(schedule.decay)
    weights, means = list(model.parameters()), list(averaged.parameters())
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        weights, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True, capturable=device.type == "cuda"
    )

    def step(*inputs: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        figures = losses(*inputs)
        figures["loss"].backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            optimizer.step()  # without a graph in the first steps of each size
        average(means, weights, None)
        return {key: value.detach() for key, value in figures.items()}

    run = prepared(step, device, log)
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
    path = folder / f"{name}.pt"
    state = {"step": 0, "seconds": 0.0, "failures": 0}

    def load() -> None:
        nonlocal run
        held = torch.load(path, map_location="cpu", weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(held[key])
        state.update(held["state"])
        optimizer.param_groups[0]["lr"] = rate
        run = prepared(step, device, log)  # the optimizer's tensors are new ones

    if path.is_file():
        load()
        log(f"{name}: continues after {state['step']} steps and {state['seconds']:.0f} s")
    else:
        _save(path, parts, state)
    begin = logged = saved = time.monotonic() - state["seconds"]
    sums, last = {}, {}
    while True:
        now = time.monotonic()
        spent = (now - begin) / schedule.seconds
        if schedule.most_steps is not None:
            spent = max(spent, state["step"] / schedule.most_steps)
        ended = spent >= 1
        if sums and (ended or now - logged > LOG_SECONDS):
            count = sums.pop("count")
            last = {key: float(value) / count for key, value in sums.items()}
            sums, logged = {}, now
            if not math.isfinite(last["loss"]):
                failures = state["failures"] + 1
                if failures == 5:
                    raise RuntimeError(f"{name}: the loss is not finite after five attempts")
                load()
                state["failures"] = failures
                log(f"{name}: the loss is not finite; back to step {state['step']} with half the learning rate")
                continue
            figures = ", ".join(f"{key} {value:.4g}" for key, value in last.items())
            log(f"{name}: {now - begin:.0f} s, {state['step']} steps, {figures}")
        if not sums and (ended or now - saved > CHECKPOINT_SECONDS):  # all losses until now are known to be finite
            state["seconds"], saved = now - begin, now
            _save(path, parts, state)
            log(f"{name}: checkpoint. {evaluate(averaged)}")
        if ended:
            return averaged, last | {"steps": state["step"], "seconds": round(now - begin, 1)}
        highest = schedule.rate * 0.5 ** state["failures"] * min(1, (state["step"] + 1) / WARM_UP)
        rate.fill_(highest * 0.5 * (1 + math.cos(math.pi * min(spent, 1))))
        figures = run(*draw(state["step"]))
        if state["step"] == 0:
            averaged.load_state_dict(model.state_dict())
        state["step"] += 1
        for key, value in figures.items():
            sums[key] = sums.get(key, 0) + value
        sums["count"] = sums.get("count", 0) + 1


def _save(path: Path, parts: dict, state: dict) -> None:
    draft = path.with_suffix(".draft")
    torch.save({name: part.state_dict() for name, part in parts.items()} | {"state": copy.copy(state)}, draft)
    draft.replace(path)
