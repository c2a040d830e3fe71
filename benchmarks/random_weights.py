"""Random weights and latents. The weights are scaled so that activations neither vanish nor explode."""

import math

import torch
from torch import Tensor

from distributed.safetensors_files import Shapes
from distributed.vae.hunyuanvideo15.layout import Architecture

FULL = (1024, 1024, 512, 256, 128)
"""HunyuanVideo-1.5's channels per level, lowest resolution first."""
TINY = (32, 32, 16, 16, 8)


def decoder_tensors(widths: tuple[int, ...], device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Return seeded tensors of a decoder of these widths, with diffusers' names without the prefix "decoder."."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        value = torch.randn(shape, generator=generator, device=device)
        if name.endswith(".gamma"):
            return 1 + 0.1 * value
        if name.endswith(".bias"):
            return 0.02 * value
        gain = 0.7 if ".resnets." in name else 1.0
        return value * gain / math.prod(shape[1:]) ** 0.5

    shapes = Architecture(widths).decoder_shapes()
    return {name.removeprefix("decoder."): draw(name, shape) for name, shape in shapes.items()}


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return a tensor of a transformer that preserves the variance of activations, on the generator's device."""
    value = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) > 1:
        return (value / math.prod(shape[1:]) ** 0.5).to(dtype)
    return (0.02 * value if name.endswith("bias") else 1 + 0.1 * value).to(dtype)  # a norm's is "weight" or "scale"


def random_tensors(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return seeded tensors of these shapes, by name, on the device."""
    generator = torch.Generator(device).manual_seed(0)
    return {name: random_tensor(name, tuple(shape), generator, dtype) for name, shape in shapes.items()}


def random_latent(*shape: int, seed: int = 0) -> Tensor:
    """Return a seeded latent of this shape, float32 on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
