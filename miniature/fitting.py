"""The training loop that both stages share: schedule by time, averaged weights, checkpoints, log lines.

The learning rate rises over the first steps and falls to zero along a cosine of the time spent, so that a stage ends in
time on any GPU. A checkpoint holds everything that the loop needs to go on in another process.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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
    measure: Callable[[int], dict[str, Tensor]],
    schedule: Schedule,
    folder: Path,
    log: Callable[[str], None],
    evaluate: Callable[[nn.Module], str] = lambda model: "",
) -> tuple[nn.Module, dict[str, float]]:
    """Train a model and return it with averaged weights, and what was measured.

    measure: returns the tensors of one step, of which "loss" is minimised. It receives the number of the step.
    evaluate: says how good the averaged model is, whenever a checkpoint is written. If the loss is not finite, the last
    checkpoint is loaded and the learning rate halved. Raises RuntimeError if that happens five times.
    """
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(schedule.decay))
    fused = next(model.parameters()).device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=fused
    )
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
    path = folder / f"{name}.pt"
    state = {"step": 0, "seconds": 0.0, "failures": 0}
    if path.is_file():
        _load(path, parts, state)
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
                _load(path, parts, state)
                state["failures"] = failures
                log(f"{name}: the loss is not finite; back to step {state['step']} with half the learning rate")
                continue
            figures = ", ".join(f"{key} {value:.4g}" for key, value in last.items())
            log(f"{name}: {now - begin:.0f} s, {state['step']} steps, {figures}")
        if not sums and (ended or now - saved > CHECKPOINT_SECONDS):  # all losses until now are known to be finite
            state["seconds"], saved = now - begin, now
            _save(path, parts, state)
            log(f"{name}: checkpoint. {evaluate(averaged.module)}")
        if ended:
            return averaged.module, last | {"steps": state["step"], "seconds": round(now - begin, 1)}
        rate = schedule.rate * 0.5 ** state["failures"] * min(1, (state["step"] + 1) / WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * min(spent, 1)))
        figures = measure(state["step"])
        optimizer.zero_grad(set_to_none=True)
        figures["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        state["step"] += 1
        for key, value in figures.items():
            sums[key] = sums.get(key, 0) + value.detach()
        sums["count"] = sums.get("count", 0) + 1


def _save(path: Path, parts: dict, state: dict) -> None:
    draft = path.with_suffix(".draft")
    torch.save({name: part.state_dict() for name, part in parts.items()} | {"state": copy.copy(state)}, draft)
    draft.replace(path)


def _load(path: Path, parts: dict, state: dict) -> None:
    held = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(held[name])
    state.update(held["state"])
