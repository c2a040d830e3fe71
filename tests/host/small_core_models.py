"""Write checkpoints with random weights in core's layout: python -m tests.host.small_core_models MODELS.

Two HunyuanVideo-1.5 transformers with one block of 128 channels each, one for text and image to video and one for super
resolution; and a full-size VAE, because core's VAELoader assumes the full widths.
"""

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.core_sampling import file_shapes
from benchmarks.random_weights import FULL
from distributed.denoise.layout import Architecture
from distributed.safetensors_files import Shapes
from distributed.vae.hunyuanvideo15 import layout

NOISE = torch.randn(2**20, generator=torch.Generator().manual_seed(0))


def weights(shapes: Shapes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return random weights of these shapes. All repeat the same numbers, which is fast."""
    state = {}
    for key, shape in shapes.items():
        if key.endswith(("gamma", "scale", "norm.weight", "norm1.weight", "norm2.weight")):
            state[key] = torch.ones(shape, dtype=dtype)
            continue
        gain = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.02
        count = math.prod(shape)
        state[key] = (NOISE * gain).to(dtype).repeat(-(-count // len(NOISE)))[:count].view(shape).clone()
    return state


def transformer(in_channels: int) -> dict[str, torch.Tensor]:
    return weights(file_shapes(Architecture(in_channels, heads=1, layers=1)), torch.float32)


def vae() -> dict[str, torch.Tensor]:
    sizes = layout.Architecture(FULL)
    shapes = {**sizes.encoder_shapes(), **sizes.decoder_shapes()}
    return weights({layout.to_core(name): shape for name, shape in shapes.items()}, torch.float16)


def main() -> None:
    models = Path(sys.argv[1])
    for folder, name, state in (
        ("diffusion_models", "small_t2v", transformer(65)),
        ("diffusion_models", "small_sr", transformer(98)),
        ("vae", "full_size", vae()),
    ):
        (models / folder).mkdir(parents=True, exist_ok=True)
        save_file(state, models / folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
