"""What the controller knows of a decode: the request, its checks and the number of frames. Imports no compute."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .tiling import SPATIAL, check_tile

TEMPORAL = 4
"""Frames of a latent frame, but for the first, which is one frame."""

MODES = ("seamless", "tiled")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DecodeRequest:
    """The one description of a decode. JSON-able through `dataclasses.asdict`.

    latent_shape is [B, C, T, H, W] in VAE space; tile_size and overlap are pixels; dtype is what ranks compute in;
    memory is what each rank may use, weights included, in bytes (None: whatever is free).
    """

    latent_shape: tuple[int, int, int, int, int]
    mode: str = "seamless"
    tile_size: int = 256
    overlap: int = 64
    dtype: str = "float32"
    memory: int | None = None

    @property
    def frames_shape(self) -> tuple[int, int, int, int, int]:
        """Shape [B, frames, height, width, 3] of the decoded video."""
        batch, _, time, height, width = self.latent_shape
        return batch, frame_count(time), height * SPATIAL, width * SPATIAL, 3


def frame_count(time: int) -> int:
    """Frames that `time` latent frames decode to."""
    return TEMPORAL * (time - 1) + 1


def check_request(request: DecodeRequest, world_size: int) -> None:
    """Refuse, with a ValueError for the person at the graph, a job that no group of this size could do."""
    if len(request.latent_shape) != 5 or min(request.latent_shape) < 1:
        raise ValueError(
            f"The latent has shape {list(request.latent_shape)}; a video latent is "
            "[batch, channels, frames, height, width] "
            "with no empty dimension. Check that it comes from a HunyuanVideo-1.5 sampler."
        )
    if request.mode not in MODES:
        raise ValueError(f"mode is {request.mode!r}; it must be one of {', '.join(MODES)}.")
    if request.dtype not in DTYPES:
        raise ValueError(f"dtype is {request.dtype!r}; it must be one of {', '.join(DTYPES)}.")
    if request.memory is not None and not 0 < request.memory < 2**63:
        raise ValueError(f"memory is {request.memory}; it must be a number of bytes, or None for whatever is free.")
    if world_size < 1:
        raise ValueError(f"A group of {world_size} ranks cannot decode; it needs at least one.")
    if request.mode == "tiled":
        check_tile(request.tile_size, request.overlap)


def check_latent(latent: Tensor, channels: int) -> None:
    """Refuse, with a ValueError, a latent [B, C, T, H, W] that a VAE of `channels` cannot decode, or a spoiled one."""
    if latent.shape[1] != channels:
        raise ValueError(
            f"The latent has {latent.shape[1]} channels and the VAE decodes {channels}. They are not of the same model."
        )
    if not latent.is_floating_point():
        raise ValueError(f"The latent holds {latent.dtype}; it must hold floating point numbers.")
    bad = latent.numel() - int(torch.isfinite(latent.float()).sum())  # 8 bit floats cannot be asked
    if bad:
        raise ValueError(f"{bad} of the latent's {latent.numel()} values are not finite; the sampler went astray.")
