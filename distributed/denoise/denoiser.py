"""The transformer of a rank group, as a function."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import JobError
from .job import Conditions, DenoiseJob
from .patches import Patches
from .weights import TransformerCheckpoint


class Denoiser:
    """Predicts velocities on ranks: what `RankGroup.denoiser` returns.

    checkpoint: the transformer. run: `RankGroup.run`. The ranks load the weights with the first step, and again after a
    release. Conditions are sent once.
    """

    def __init__(self, checkpoint: TransformerCheckpoint, run: Callable[..., dict[str, Tensor]]) -> None:
        self.checkpoint, self._run = checkpoint, run

    def conditions(self, **tensors: Tensor) -> Conditions:
        """Prepare the conditions of many steps once; see `Conditions.make`. Raises JobError if they do not fit."""
        try:
            return Conditions.make(self.checkpoint, **tensors)
        except ValueError as error:
            raise JobError(str(error)) from error

    def __call__(
        self,
        latents: Tensor,
        timestep: float | Tensor,
        conditions: Sequence[Conditions | Mapping[str, Tensor]],
        *,
        timestep_r: float | Tensor | None = None,
        memory: int | None = None,
        averaged_times: bool = False,
        dtype: str | torch.dtype | None = None,
        patches: Patches | None = None,
        **watching: object,
    ) -> Tensor:
        """Return the velocity of each condition, [len(conditions), B, C', t, h, w], float32 on the CPU.

        latents: [B, C, t, h, w], where C is what the transformer takes, less the channels of the conditions' latents.
        timestep: one number, or one for each video, from 0 to 1000. conditions: one, or two with guidance, each made by
        `conditions` or a mapping of its arguments. timestep_r: the second time of meanflow transformers, as diffusers
        defines it, from 0 to 1000: 1000 times what core embeds, which is a sigma. None: the function without it.
        averaged_times: whether the embeddings of both times are averaged, as ComfyUI 0.3.75 does, or added, as
        diffusers and later versions do. memory: bytes that each rank may use. dtype: of the computation, "float32",
        "bfloat16" or "float16"; None: the group's. patches: changes of the weights, which stay until a step has others
        or None. watching: callbacks and timeout of `RankGroup.run`, which documents the errors, too.
        """
        prepared = [c if isinstance(c, Conditions) else self.conditions(**c) for c in conditions]
        try:
            job = DenoiseJob.make(
                self.checkpoint,
                latents,
                timestep,
                prepared,
                timestep_r,
                memory,
                averaged_times=averaged_times,
                dtype=dtype,
                patches=patches,
            )
        except ValueError as error:
            raise JobError(str(error)) from error
        return job.velocity(self._run(job, **watching)["rows"])
