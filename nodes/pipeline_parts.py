"""Parts of our own for diffusers' pipelines. Imported only when a pipeline runs: other nodes need no diffusers."""

import copy
from collections.abc import Callable, Mapping, Sequence

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from torch import Tensor, nn

from ..distributed.denoise.denoiser import Denoiser
from ..distributed.denoise.job import Conditions


class ReportingScheduler(FlowMatchEulerDiscreteScheduler):
    """Calls `on_step` in each step with the predicted clean latents. What it raises ends the sampling."""

    on_step: Callable[[Tensor], None]

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: object) -> tuple:
        result = super().step(model_output, timestep, sample, **options)
        self.on_step(sample - self.sigmas[self.step_index - 1].to(sample) * model_output)
        return result


class FixedSizeProcessor(HunyuanVideo15ImageProcessor):
    """Uses the node's size instead of the one that the pipeline would choose by the image's proportions."""

    size: tuple[int, int]

    def calculate_default_height_width(self, height: int, width: int, target_size: int) -> tuple[int, int]:
        return self.size


def changes_transformer(guider: BaseGuidance) -> bool:
    """Return whether a guider changes the transformer's layers for some branches, as skip-layer guidance does.

    It does so with hooks on diffusers' own forward. A forward of ours would ignore them.
    """
    return type(guider).prepare_models is not BaseGuidance.prepare_models


CONDITIONS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_hidden_states_2",
    "encoder_attention_mask_2",
)
"""The arguments of a transformer's forward in which the branches of a step differ."""


def module_on_ranks(model: nn.Module, guider: object, predict: Callable[..., Tensor], denoiser: Denoiser) -> nn.Module:
    """Return a shell around a pipeline's transformer whose forward runs on ranks: all branches of a step in one job.

    The pipeline has the guider prepare the branches of a step, and then calls the transformer with one after the other.
    The shell hears of them from the guider, which must be this run's own. predict: calls the denoiser. The shell serves
    one sampling: conditions and condition channels are taken to be the same in all of its steps.
    """
    shell, prepare = copy.copy(model), guider.prepare_inputs
    shell.forward = forward = _ForwardOnRanks(predict, denoiser)

    def prepare_inputs(data: Mapping) -> list:
        branches = prepare(data)
        forward.begin(branches)
        return branches

    guider.prepare_inputs = prepare_inputs
    return shell


class _ForwardOnRanks:
    """diffusers' forward: the first call of a step computes all of its branches, and each call returns the next one."""

    def __init__(self, predict: Callable[..., Tensor], denoiser: Denoiser) -> None:
        self.predict, self.denoiser = predict, denoiser
        self.branches: Sequence[object] = ()
        self.velocities: list[Tensor] = []
        self.prepared: list[tuple[list[Tensor], Conditions]] = []
        """Compared by identity: a pipeline passes the same tensors in every step."""

    def begin(self, branches: Sequence[object]) -> None:
        """Begin a step. branches: what the guider has prepared, in the order in which the pipeline asks for them."""
        self.branches, self.velocities = branches, []

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        timestep_r: Tensor | None = None,
        image_embeds: Tensor | None = None,
        return_dict: bool = True,
        **_: object,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """See HunyuanVideo15Transformer3DModel.forward."""
        if not self.velocities:
            noise = self.denoiser.checkpoint.architecture.out_channels
            texts = [[getattr(branch, name) for name in CONDITIONS] for branch in self.branches]
            conditions = [self._prepare(of_branch, image_embeds, hidden_states[:, noise:]) for of_branch in texts]
            velocities = self.predict(hidden_states[:, :noise], timestep, conditions, timestep_r=timestep_r)
            self.velocities = list(velocities.to(hidden_states))
        sample = self.velocities.pop(0)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _prepare(self, texts: list[Tensor], image: Tensor | None, latents: Tensor) -> Conditions:
        for seen, conditions in self.prepared:
            if all(one is other for one, other in zip(seen, texts, strict=True)):
                return conditions
        named = dict(zip(CONDITIONS, texts, strict=True))
        conditions = self.denoiser.conditions(**named, image_embeds=image, latents=latents)
        self.prepared.append((texts, conditions))
        return conditions
