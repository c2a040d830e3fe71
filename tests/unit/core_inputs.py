"""Weights and inputs of core's HunyuanVideo-1.5 transformer, and steps of a rank with them."""

import torch
from torch import Tensor

from distributed.denoise.job import Conditions, DenoiseJob
from distributed.denoise.layout import Architecture
from distributed.denoise.weights import core_shapes
from tests.unit.denoise_models import draw_weight


def random_weights(architecture: Architecture, seed: int = 0) -> dict[str, Tensor]:
    """Return weights by core's keys that preserve the variance of activations."""
    generator = torch.Generator().manual_seed(seed)
    return {key: draw_weight(key, shape, generator) for key, shape in core_shapes(architecture).items()}


def core_inputs(
    channels: int = 65, videos: int = 1, text: int = 7, glyphs: int = 0, image: int = 0
) -> dict[str, Tensor]:
    """Return inputs of core's forward. text, glyphs, image: numbers of tokens; 0: the input is absent."""
    generator = torch.Generator().manual_seed(1)
    widths = {"context": (text, 3584), "txt_byt5": (glyphs, 1472), "clip_fea": (image, 1152)}
    found = {"x": torch.randn(videos, channels, 2, 3, 5, generator=generator)}
    for name, size in widths.items():
        if size[0]:
            found[name] = torch.randn(videos, *size, generator=generator)
    return found


def job_of(checkpoint, inputs: dict[str, Tensor], time: float = 731.0, **options) -> DenoiseJob:
    """Return a step of one branch for inputs of core's forward."""
    inputs = dict(inputs)
    x = inputs.pop("x")
    conditions = Conditions.of_core(checkpoint, **inputs, latents=x[:, 32:])
    return DenoiseJob.make(checkpoint, x[:, :32], time, [conditions], **options)
