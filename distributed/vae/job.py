"""A decode as the controller describes it: the request, its checks and its frame count. Imports no compute code."""

import operator
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..jobs import Load, TensorSpec
from ..ranks.shared_memory import place_of
from .checkpoint import Checkpoint, open_checkpoint
from .handover import SharedWeights, fingerprint
from .tiling import SPATIAL, check_tile

KIND = NOUN = "decode"
"""Name of this kind of job in the group's status and in messages."""

TEMPORAL = 4
"""Frames per latent frame, except for the first, which decodes to one frame."""

MODES = ("seamless", "tiled")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DecodeRequest:
    """The description of a decode. `dataclasses.asdict` converts it to JSON.

    latent_shape is [B, C, T, H, W] in VAE space. tile_size and overlap are in pixels. memory is the limit per rank in
    bytes, including weights (None: all free memory).
    """

    latent_shape: tuple[int, int, int, int, int]
    mode: str = "seamless"
    tile_size: int = 256
    overlap: int = 64
    memory: int | None = None

    @classmethod
    def from_json(cls, value: Mapping) -> "DecodeRequest":
        """Return the request of which `value` is the JSON form."""
        return cls(**{**value, "latent_shape": tuple(value["latent_shape"])})

    @property
    def frames_shape(self) -> tuple[int, int, int, int, int]:
        """Shape [B, frames, height, width, 3] of the decoded video."""
        batch, _, time, height, width = self.latent_shape
        return batch, frame_count(time), height * SPATIAL, width * SPATIAL, 3


def frame_count(time: int) -> int:
    """Return the number of frames that `time` latent frames decode to."""
    return TEMPORAL * (time - 1) + 1


def check_request(request: DecodeRequest, world_size: int) -> None:
    """Raise ValueError, with a message for the user, for a request that a group of this size cannot decode."""
    if len(request.latent_shape) != 5 or min(request.latent_shape) < 1:
        raise ValueError(
            f"The latent has shape {list(request.latent_shape)}; a video latent is "
            "[batch, channels, frames, height, width] "
            "with no empty dimension. Check that it comes from a HunyuanVideo-1.5 sampler."
        )
    if request.mode not in MODES:
        raise ValueError(f"mode is {request.mode!r}; it must be one of {', '.join(MODES)}.")
    if request.memory is not None and not 0 < request.memory < 2**63:
        raise ValueError(f"memory is {request.memory}; it must be a number of bytes, or None for all free memory.")
    if world_size < 1:
        raise ValueError(f"A group of {world_size} ranks cannot decode; it needs at least one.")
    if request.mode == "tiled":
        check_tile(request.tile_size, request.overlap)


def check_latent(latent: Tensor, channels: int) -> None:
    """Raise ValueError for a latent [B, C, T, H, W] with wrong channels or dtype, or with NaN or infinite values."""
    if latent.shape[1] != channels:
        raise ValueError(
            f"The latent has {latent.shape[1]} channels; the VAE decodes {channels}. They belong to different models."
        )
    if not latent.is_floating_point():
        raise ValueError(f"The latent has dtype {latent.dtype}; it must be a floating-point dtype.")
    bad = latent.numel() - int(torch.isfinite(latent.float()).sum())  # isfinite does not support 8-bit floats
    if bad:
        raise ValueError(
            f"{bad} of {latent.numel()} latent values are NaN or infinite. Check the sampler's settings and dtype."
        )


@dataclass(frozen=True)
class WeightSource:
    """A recognised and checked VAE, and the file or folder from which ranks load it."""

    path: Path
    checkpoint: Checkpoint
    shared: SharedWeights | None = None
    """The shared memory at `path`, for weights that exist only in memory. It is freed with this object."""

    @classmethod
    def find(
        cls, vae: str | os.PathLike | Mapping[str, Tensor], before: "WeightSource | None" = None
    ) -> "WeightSource":
        """Check a checkpoint's path, or share a state dict's weights. `before` is returned if its weights are the same.

        Raises ValueError for an unusable VAE, OSError if the file is missing or unreadable, and MemoryError if the
        weights do not fit into shared memory.
        """
        if isinstance(vae, str | os.PathLike):
            path = Path(vae).absolute()  # ranks have another working directory
            return cls(path, open_checkpoint(path))
        mark = fingerprint(vae)
        if before and before.shared and before.shared.mark == mark:
            return before
        shared = SharedWeights(vae, mark)
        return cls(shared.path, open_checkpoint(shared.path), shared)

    def load(self, host_only: Collection[str]) -> Load:
        """Return the `Load` of these weights. Ranks on the devices in `host_only` only read them into host memory."""
        return Load(KIND, {"checkpoint": place_of(self.path), "host_only": list(host_only)})


@dataclass(frozen=True, eq=False)
class DecodeJob:
    """A checked decode of `latent` to the output "frames". It is a `Job`; create it with `DecodeJob.make`."""

    request: DecodeRequest
    source: WeightSource
    latent: Tensor
    kind: str = KIND
    noun: str = NOUN
    loads: tuple[Load, ...] = ()
    last: bool = True

    @classmethod
    def make(
        cls,
        latent: Tensor,
        source: WeightSource,
        mode: str = "seamless",
        *,
        tile_size: int = 256,
        overlap: int = 64,
        memory: int | None = None,
        world_size: int = 1,
    ) -> "DecodeJob":
        """Check all arguments of a decode and return the job. Raises ValueError with a message for the user.

        latent is [B, C, t, h, w] in VAE space; tile_size and overlap are in pixels; memory is a limit per rank in
        bytes.
        """
        pixels = _whole("tile_size", tile_size), _whole("overlap", overlap)
        limit = None if memory is None else _whole("memory", memory)
        request = DecodeRequest(tuple(latent.shape), mode, *pixels, limit)
        check_request(request, world_size)
        check_latent(latent, source.checkpoint.latent_channels)
        return cls(request, source, latent.detach().to("cpu", torch.float32))

    @property
    def memory(self) -> int | None:
        return self.request.memory

    @property
    def fields(self) -> dict:
        return {"checkpoint": place_of(self.source.path), "request": asdict(self.request)}

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"latent": self.latent}

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        return {"frames": TensorSpec(self.request.frames_shape)}

    def limited(self, memory: int) -> "DecodeJob":
        return replace(self, request=replace(self.request, memory=memory))


def _whole(name: str, value: object) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be a whole number.") from None
