"""One sampling by core in which the network's forward runs on ranks.

Core computes the guidance branches one after the other if their lengths differ. To compute them in parallel anyway, the
run learns which branch follows which: the branch that is asked for and its likely successor are one job, and the
successor's result is kept until it is asked for with exactly the inputs that were assumed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.denoise.job import Conditions

Predict = Callable[..., Tensor]
"""`Denoiser.__call__`, with the run's memory limit and callbacks."""


@dataclass(frozen=True, eq=False)
class Branch:
    """The inputs of one branch that are the same in all steps.

    parts: text, its mask, glyph text, image and condition channels, or None. Their first dimension is the video.
    prepared: the same for the ranks.
    """

    parts: tuple[Tensor | None, ...]
    prepared: Conditions

    def equals(self, parts: Sequence[Tensor | None]) -> bool:
        return all(_equal(one, other) for one, other in zip(self.parts, parts, strict=True))

    def fits(self, other: "Branch") -> bool:
        """Return whether both are for latents of the same shape."""
        return self.parts[-1].shape == other.parts[-1].shape


@dataclass(frozen=True, eq=False)
class Moment:
    """The inputs of a forward that change from step to step: noisy latents [B, C, t, h, w] and timesteps.

    step: number of the step in the schedule, from 1, and the number of steps.
    """

    noise: Tensor
    timestep: Tensor
    timestep_r: float | None
    step: tuple[int, int] | None

    def equals(self, other: "Moment") -> bool:
        same = _equal(self.noise, other.noise) and _equal(self.timestep, other.timestep)
        return same and self.timestep_r == other.timestep_r


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


class Forward:
    """core's `HunyuanVideo._forward`, computed by ranks, for one sampling.

    predict: computes the forwards of one or two conditions. prepare: `Conditions.of_core` of a checkpoint. channels:
    number of noise channels. meanflow: whether the network has a second time.
    """

    def __init__(self, predict: Predict, prepare: Callable[..., Conditions], channels: int, meanflow: bool) -> None:
        self.predict, self.prepare = predict, prepare
        self.channels, self.meanflow = channels, meanflow
        self._branches: dict[object, Branch] = {}
        """Branches of this run by core's ids of their conditionings."""
        self._follows: dict[object, object] = {}
        """Which branch was computed next for the same moment."""
        self._last: tuple[object, Moment] | None = None
        self._ahead: tuple[Branch, Moment, Tensor] | None = None
        """A branch that was computed ahead, and its prediction."""

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        txt_byt5: Tensor | None = None,
        clip_fea: Tensor | None = None,
        guidance: Tensor | None = None,
        attention_mask: Tensor | None = None,
        guiding_frame_index: Tensor | None = None,
        ref_latent: Tensor | None = None,
        disable_time_r: bool = False,
        control: dict | None = None,
        transformer_options: dict | None = None,
        **_: object,
    ) -> Tensor:
        """Return the prediction [B, C, t, h, w] in x's dtype. y and guidance are not used by this model."""
        for name, value in (
            ("guiding_frame_index", guiding_frame_index),
            ("ref_latent", ref_latent),
            ("control", control),
        ):
            if value is not None:
                raise ValueError(
                    f"Ranks cannot compute a forward with {name}. Remove Distribute Model from this graph."
                )
        options = transformer_options or {}
        time_r = None if disable_time_r or not self.meanflow else second_time(options)
        uuids = options.get("uuids") or [None]
        parts = (context, attention_mask, txt_byt5, clip_fea, x[:, self.channels :])
        moment = Moment(x[:, : self.channels], timestep, time_r, step_of(options))
        if len(uuids) == 2:
            (one, own), (other, others) = (_half(moment, parts, i) for i in range(2))
            if one.equals(other):
                pair = [self._branch(uuids[0], own), self._branch(uuids[1], others)]
                return self._predicted(one, pair).flatten(0, 1).to(x)
        return self._one(tuple(uuids), moment, parts).to(x)

    def _one(self, key: object, moment: Moment, parts: tuple[Tensor | None, ...]) -> Tensor:
        """Return the prediction of one branch, [B, C, t, h, w]."""
        branch = self._branch(key, parts)
        ahead, self._ahead = self._ahead, None
        last, self._last = self._last, (key, moment)
        if last is not None and last[0] != key and last[1].equals(moment):
            self._follows[last[0]] = key
        elif ahead is not None:  # it was not asked for: guidance has ended, or pauses
            del self._follows[last[0]]
        if ahead is not None and ahead[0] is branch and ahead[1].equals(moment):
            return ahead[2]
        following = self._branches.get(self._follows.get(key))
        if following is None or not following.fits(branch):
            return self._predicted(moment, [branch])[0]
        prediction, next_prediction = self._predicted(moment, [branch, following])
        self._ahead = following, moment, next_prediction
        return prediction

    def _branch(self, key: object, parts: tuple[Tensor | None, ...]) -> Branch:
        """Return the branch, prepared for the ranks. The inputs decide; the key only says where to look."""
        known = self._branches.get(key)
        if known is None or not known.equals(parts):
            parts = tuple(None if part is None else part.clone() for part in parts)
            known = self._branches[key] = Branch(parts, self.prepare(*parts))
        return known

    def _predicted(self, moment: Moment, branches: Sequence[Branch]) -> Tensor:
        return self.predict(
            moment.noise,
            moment.timestep,
            [branch.prepared for branch in branches],
            timestep_r=moment.timestep_r,
            dtype=moment.noise.dtype,
            step=moment.step,
        )


def _half(moment: Moment, parts: Sequence[Tensor | None], i: int) -> tuple[Moment, tuple[Tensor | None, ...]]:
    """Return half i of a batch that core has made of two conditionings."""
    half = Moment(moment.noise.chunk(2)[i], moment.timestep.chunk(2)[i], moment.timestep_r, moment.step)
    return half, tuple(None if part is None else part.chunk(2)[i] for part in parts)


def second_time(options: dict) -> float | None:
    """Return the next step's time, from 0 to 1000, or None if the current sigma is not one of the schedule's.

    core's network looks it up in the same way.
    """
    sigmas, current = options["sample_sigmas"], options["sigmas"][0]
    found = torch.where(sigmas == current)[0]
    return 1000 * float(sigmas[found[0] + 1]) if len(found) else None


def step_of(options: dict) -> tuple[int, int] | None:
    """Return the number of the current step, from 1, and the number of steps, if core says which sigma it is at."""
    sigmas, current = options.get("sample_sigmas"), options.get("sigmas")
    if sigmas is None or current is None or len(sigmas) < 2:
        return None
    steps = len(sigmas) - 1
    return max(1, min(steps, int((sigmas >= current[0]).sum()))), steps
