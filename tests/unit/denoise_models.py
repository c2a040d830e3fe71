"""Small transformers and inputs for the denoising tests."""

from collections.abc import Sequence

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from torch import Tensor

from distributed.denoise.job import DenoiseJob
from distributed.denoise.task import DenoiseTask
from distributed.ranks.collective import Watch
from distributed.ranks.task import JobWatch

CONFIG = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 3,
    "num_refiner_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 24,
    "text_embed_2_dim": 20,
    "image_embed_dim": 12,
    "rope_axes_dim": (4, 6, 6),
}


def draw_weight(name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return a random weight, in diffusers' or core's names, that preserves the variance of activations."""
    draw = torch.randn(shape, generator=generator)
    if draw.ndim > 1:
        return draw if "cond_type" in name else draw / draw[0].numel() ** 0.5
    return 0.1 * draw + (0.0 if name.endswith("bias") else 1.0)


def error(result: Tensor, expected: Tensor) -> float:
    """Return the relative L2 difference of a finite result."""
    assert result.shape == expected.shape and result.isfinite().all()
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def make_model(seed: int = 0, **changes: object) -> HunyuanVideo15Transformer3DModel:
    """Return a small transformer with random weights, norms included, that preserve the variance of activations."""
    model = HunyuanVideo15Transformer3DModel(**CONFIG | changes).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.copy_(draw_weight(name, weight.shape, generator))
    return model


def make_inputs(
    model: HunyuanVideo15Transformer3DModel,
    latent: tuple[int, int, int] = (3, 4, 5),
    text: tuple[int, ...] = (5,),
    glyphs: tuple[int, ...] = (3,),
    image: bool = True,
    padded: tuple[int, int, int] = (9, 6, 7),
    seed: int = 1,
) -> dict[str, Tensor]:
    """Return arguments of diffusers' forward for a batch of videos.

    text, glyphs: number of valid tokens of each video. padded: tokens of text, glyphs and image including padding,
    which is random too.
    """
    generator, config, batch = torch.Generator().manual_seed(seed), model.config, len(text)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    def mask(lengths: tuple[int, ...], size: int) -> Tensor:
        return (torch.arange(size) < torch.tensor(lengths)[:, None]).float()

    inputs = {
        "hidden_states": draw(config.in_channels, *latent),
        "timestep": torch.full((batch,), 731.0),
        "encoder_hidden_states": draw(padded[0], config.text_embed_dim),
        "encoder_attention_mask": mask(text, padded[0]),
        "encoder_hidden_states_2": draw(padded[1], config.text_embed_2_dim),
        "encoder_attention_mask_2": mask(glyphs, padded[1]),
        "image_embeds": draw(padded[2], config.image_embed_dim) * image,
    }
    return inputs | ({"timestep_r": torch.full((batch,), 402.0)} if config.use_meanflow else {})


def run(task: DenoiseTask, job: DenoiseJob, watch: Watch | None = None) -> Tensor:
    """Do everything that a rank does for a job, with its loads sent before, and return the first velocity."""
    watch = watch or JobWatch()
    for load in job.loads:
        task.load(load.fields | {"dtype": "float32"}, load.inputs, watch)
    fields = job.fields | {"dtype": "float32"}
    tensors = {**job.inputs, **{name: torch.full(spec.shape, torch.nan) for name, spec in job.outputs.items()}}
    task.load(fields, tensors, watch)
    task.run(fields, tensors, watch)
    return job.velocity(tensors["rows"])[0]
