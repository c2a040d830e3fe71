"""Checkpoints of the VAE on disk: their files and tensors. Only safetensors files are read."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..safetensors_files import describe_tensors, find_files, identity_of, name_of, open_file
from .hunyuanvideo15.layout import (
    DIFFUSERS_CLASS,
    Architecture,
    by_diffusers_name,
    check_tensors,
    problems,
    read_architecture,
    recognise,
    to_diffusers,
)


@dataclass(frozen=True)
class Checkpoint:
    """A recognised and checked VAE on disk."""

    files: tuple[Path, ...]
    layout: str
    """"diffusers" or "core"."""
    latent_channels: int
    block_out_channels: tuple[int, ...]
    """Channels per level, highest resolution first, as in diffusers' config."""
    layers_per_block: int
    dtype: torch.dtype
    has_encoder: bool
    """Whether the files also have a complete encoder."""

    @property
    def architecture(self) -> Architecture:
        return Architecture(self.block_out_channels[::-1], self.layers_per_block + 1, self.latent_channels)

    @property
    def identity(self) -> str:
        """Identifies the files: it changes if a path, size or modification time changes."""
        return identity_of(self.files)


def open_checkpoint(path: str | os.PathLike, *, encoder: bool = False) -> Checkpoint:
    """Recognise and check a VAE: a .safetensors file of either layout, or a diffusers folder.

    encoder: also require the encoder. Unneeded tensors are ignored. Raises CheckpointError, which describes the
    problem, and FileNotFoundError.
    """
    files = find_files(Path(path), "vae", DIFFUSERS_CLASS)
    shapes, dtypes = describe_tensors(files)
    name = name_of(Path(path), "The VAE")
    layout = recognise(shapes, name)
    keys = by_diffusers_name(shapes, name)
    shapes, dtypes = ({new: found[key] for new, key in keys.items()} for found in (shapes, dtypes))
    architecture = read_architecture(shapes, name)
    check_tensors(architecture.decoder_shapes(), shapes, dtypes, name)
    encoder_shapes = architecture.encoder_shapes()
    if encoder:
        if not encoder_shapes.keys() & shapes.keys():
            raise CheckpointError(f"{name} is not a complete HunyuanVideo-1.5 VAE: it has no encoder.")
        check_tensors(encoder_shapes, shapes, dtypes, name)
    return Checkpoint(
        files,
        layout,
        architecture.latent_channels,
        architecture.widths[::-1],
        architecture.resnets - 1,
        dtypes["decoder.conv_in.conv.weight"],
        has_encoder=encoder or not problems(encoder_shapes, shapes, dtypes),
    )


def decoder_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the decoder's tensors, mapped from the file, by diffusers' names without the prefix "decoder."."""
    found = _read(checkpoint, set(checkpoint.architecture.decoder_shapes()))
    return {key.removeprefix("decoder."): value for key, value in found.items()}


def all_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors of the decoder and of the encoder, if any, mapped from the file, by diffusers' names."""
    architecture = checkpoint.architecture
    encoder = architecture.encoder_shapes() if checkpoint.has_encoder else {}
    return _read(checkpoint, architecture.decoder_shapes().keys() | encoder.keys())


def _read(checkpoint: Checkpoint, names: set[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in checkpoint.files:
        with open_file(file) as tensors:
            keys = {to_diffusers(key): key for key in tensors.keys()}  # noqa: SIM118  not a mapping
            found |= {name: tensors.get_tensor(key) for name, key in keys.items() if name in names}
    return found
