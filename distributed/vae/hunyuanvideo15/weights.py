"""The decoder's weights on a device, prepared for the kernels."""

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.winograd import transform_taps

TAP_ROWS = 96
"""Rows of the last convolution's taps: 27 taps x 3 colours, padded to a multiple of 16."""


class Conv(NamedTuple):
    m: int
    """Frames per group: F(m, 3) of `ops.winograd`."""
    taps: Tensor
    """[>= m + 2, out, in, 3, 3], transformed (see `ops.winograd`)."""
    bias: Tensor
    """[out], float32."""


class Resnet(NamedTuple):
    norm1: Tensor
    conv1: Conv
    norm2: Tensor
    conv2: Conv


class Upsampler(NamedTuple):
    conv: Conv
    temporal: bool


class Attention(NamedTuple):
    norm: Tensor
    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    value: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]


def frames_per_group(rate: int) -> int:
    """Return the frames per group (m) of a level with `rate` frames per latent frame.

    It is 4 at the video's full rate, with half of the multiplications, and 2 at earlier levels, with two thirds. With 4
    one level earlier, the error in bfloat16 would exceed that of diffusers.
    """
    return 4 if rate % 4 == 0 else 2


class Weights:
    """The decoder's weights on a device, in the order in which they are used.

    `tensors` has diffusers' names without the prefix "decoder."; widths, depth and the temporal upsamplers are derived
    from the shapes.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        def vector(name: str) -> Tensor:
            return tensors[name].flatten().to(device=device, dtype=torch.float32)

        def matrix(name: str) -> tuple[Tensor, Tensor]:
            weight = tensors[f"{name}.weight"].flatten(1).to(device=device, dtype=dtype)
            return weight, vector(f"{name}.bias").to(dtype)

        def conv(name: str, m: int = 2) -> Conv:
            weight = tensors[f"{name}.conv.weight"].to(device)
            return Conv(m, transform_taps(weight, dtype, m), vector(f"{name}.conv.bias"))

        def resnet(name: str, m: int = 2) -> Resnet:
            return Resnet(
                vector(f"{name}.norm1.gamma"),
                conv(f"{name}.conv1", m),
                vector(f"{name}.norm2.gamma"),
                conv(f"{name}.conv2", m),
            )

        def count(prefix: str) -> int:
            return len({name[len(prefix) + 1 :].split(".")[0] for name in tensors if name.startswith(f"{prefix}.")})

        self.device, self.dtype = device, dtype
        self.conv_in = conv("conv_in")
        self.mid = tuple(resnet(f"mid_block.resnets.{i}") for i in range(2))
        name = "mid_block.attentions.0"
        self.attention = Attention(
            vector(f"{name}.norm.gamma"),
            *(matrix(f"{name}.{key}") for key in ("to_q", "to_k", "to_v", "proj_out")),
        )
        self.resnets: list[tuple[Resnet, ...]] = []
        """The residual blocks of each level."""
        self.upsamplers: list[Upsampler] = []
        self.rates: list[int] = []
        """Frames of each level per latent frame. The video's first latent frame is one frame on every level."""
        for i in range(count("up_blocks")):
            level = f"up_blocks.{i}"
            self.rates.append(2 ** sum(up.temporal for up in self.upsamplers))
            m = frames_per_group(self.rates[i])
            self.resnets.append(tuple(resnet(f"{level}.resnets.{j}", m) for j in range(count(f"{level}.resnets"))))
            if f"{level}.upsamplers.0.conv.conv.weight" in tensors:
                up = conv(f"{level}.upsamplers.0.conv", m)
                following = tensors[f"up_blocks.{i + 1}.resnets.0.conv1.conv.weight"].shape[1]
                self.upsamplers.append(Upsampler(up, temporal=len(up.bias) == 8 * following))
        self.norm_out = vector("norm_out.gamma")
        self.conv_out_bias = vector("conv_out.conv.bias")
        # [colour, C, t, y, x] -> one row for each (t, y, x, colour), padded to `TAP_ROWS`
        last = tensors["conv_out.conv.weight"].to(device=device, dtype=dtype)
        taps = last.permute(2, 3, 4, 0, 1).flatten(0, 3)
        self.taps = F.pad(taps, (0, 0, 0, TAP_ROWS - len(taps))).contiguous()
        self.widths = tuple(len(resnets[0].conv1.bias) for resnets in self.resnets)
        self.latent_channels = self.conv_in.taps.shape[2]

    @classmethod
    def without_memory(cls, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> "Weights":
        """Return weights whose tensors have shapes and no values, to plan a decode on a device."""
        meta = torch.device("meta")
        weights = cls({name: tensor.to(meta) for name, tensor in tensors.items()}, meta, dtype)
        weights.device = device
        return weights

    @property
    def full_rate_level(self) -> int:
        """The first level at the video's full frame rate. Level 0 is the trunk's."""
        return 1 + max((i for i, up in enumerate(self.upsamplers) if up.temporal), default=-1)

    @property
    def convs(self) -> tuple[int, ...]:
        """Number of convolutions per level of the tail, including the level's upsampler or the last convolution."""
        return (1, *(2 * len(resnets) + 1 for resnets in self.resnets[1:]))

    @cached_property
    def nbytes(self) -> int:
        """Size in bytes of the weights on the device."""
        total = 0
        stack: list = [v for v in vars(self).values()]
        while stack:
            item = stack.pop()
            if isinstance(item, Tensor):
                total += item.nbytes
            elif isinstance(item, tuple | list):
                stack.extend(item)
        return total
