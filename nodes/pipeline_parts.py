"""Parts of our own for diffusers' pipelines. Imported where a pipeline runs: other nodes need no diffusers."""

from collections.abc import Callable

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from torch import Tensor


class ReportingScheduler(FlowMatchEulerDiscreteScheduler):
    """Tells `on_step` at each step what the model now believes the end to be; what that raises ends the sampling."""

    on_step: Callable[[Tensor], None]

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: object) -> tuple:
        result = super().step(model_output, timestep, sample, **options)
        self.on_step(sample - self.sigmas[self.step_index - 1].to(sample) * model_output)
        return result


class FixedSizeProcessor(HunyuanVideo15ImageProcessor):
    """Takes the size that the node was given where the pipeline would choose one by the image's proportions."""

    size: tuple[int, int]

    def calculate_default_height_width(self, height: int, width: int, target_size: int) -> tuple[int, int]:
        return self.size
