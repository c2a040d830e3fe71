"""Random weights and latents. A decoder of any width, sane enough that activations neither vanish nor explode."""

import torch
from torch import Tensor

FULL = (1024, 1024, 512, 256, 128)
"""HunyuanVideo-1.5's widths, deepest level first."""
TINY = (32, 32, 16, 16, 8)


def decoder_tensors(widths: tuple[int, ...], device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a decoder with these widths, in diffusers' names without "decoder.", seeded."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def conv(name: str, outputs: int, inputs: int, size: int = 3, gain: float = 1.0) -> None:
        tensors[f"{name}.weight"] = normal(outputs, inputs, size, size, size) * gain / (inputs * size**3) ** 0.5
        tensors[f"{name}.bias"] = 0.02 * normal(outputs)

    def resnet(name: str, channels: int) -> None:
        for part in (1, 2):
            tensors[f"{name}.norm{part}.gamma"] = 1 + 0.1 * normal(channels, 1, 1, 1)
            conv(f"{name}.conv{part}.conv", channels, channels, gain=0.7)

    conv("conv_in.conv", widths[0], 32)
    for i in range(2):
        resnet(f"mid_block.resnets.{i}", widths[0])
    tensors["mid_block.attentions.0.norm.gamma"] = 1 + 0.1 * normal(widths[0], 1, 1, 1)
    for part in ("to_q", "to_k", "to_v", "proj_out"):
        conv(f"mid_block.attentions.0.{part}", widths[0], widths[0], 1)
    for level, channels in enumerate(widths):
        for i in range(3):
            resnet(f"up_blocks.{level}.resnets.{i}", channels)
        if level + 1 < len(widths):
            conv(f"up_blocks.{level}.upsamplers.0.conv.conv", widths[level + 1] * (8 if level < 2 else 4), channels)
    tensors["norm_out.gamma"] = 1 + 0.1 * normal(widths[-1], 1, 1, 1)
    conv("conv_out.conv", 3, widths[-1])
    return tensors


def random_latent(*shape: int, seed: int = 0) -> Tensor:
    """A latent of this shape, float32 on the CPU, seeded."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
