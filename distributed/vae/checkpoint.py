"""Checkpoints of the VAE on disk: which files they are, and the tensors in them. Files are safetensors only."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..quoting import printable, quote
from .hunyuanvideo15.layout import (
    DIFFUSERS_CLASS,
    DTYPES,
    Architecture,
    by_diffusers_name,
    check_tensors,
    first_names,
    problems,
    read_architecture,
    recognise,
    to_diffusers,
)

INDEX = ".safetensors.index.json"
JSON_LIMIT = 16 * 2**20
"""Bytes that are read of a config or an index; real ones have some kilobytes."""


@dataclass(frozen=True)
class Checkpoint:
    """A VAE on disk that was recognised and checked."""

    files: tuple[Path, ...]
    layout: str
    """"diffusers" or "core"."""
    latent_channels: int
    block_out_channels: tuple[int, ...]
    """As in diffusers' config: highest resolution first."""
    layers_per_block: int
    dtype: torch.dtype
    has_encoder: bool
    """Whether the whole encoder is there, too."""

    @property
    def architecture(self) -> Architecture:
        return Architecture(self.block_out_channels[::-1], self.layers_per_block + 1, self.latent_channels)

    @property
    def identity(self) -> str:
        """Changes when the files do."""
        stats = [(path, path.stat()) for path in self.files]
        return "|".join(f"{path}:{s.st_size}:{s.st_mtime_ns}" for path, s in stats)


def open_checkpoint(path: str | os.PathLike, *, encoder: bool = False) -> Checkpoint:
    """Recognise and check a VAE: a .safetensors file of either layout, or a diffusers folder.

    encoder: refuse a VAE without its encoder as well. Tensors that are not needed are ignored. Raises CheckpointError
    with what is wrong, FileNotFoundError where there is nothing.
    """
    files = _files(Path(path))
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype | str] = {}
    for file in files:
        with _open(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  not a mapping
                header = tensors.get_slice(key)
                shapes[key] = tuple(header.get_shape())
                dtypes[key] = DTYPES.get(header.get_dtype(), header.get_dtype())
    name = "The VAE" if _is_handed_over(Path(path)) else printable(Path(path).name)
    layout = recognise(shapes, name)
    keys = by_diffusers_name(shapes, name)
    shapes, dtypes = ({new: found[key] for new, key in keys.items()} for found in (shapes, dtypes))
    architecture = read_architecture(shapes, name)
    check_tensors(architecture.decoder_shapes(), shapes, dtypes, name)
    encoder_shapes = architecture.encoder_shapes()
    if encoder:
        if not encoder_shapes.keys() & shapes.keys():
            raise CheckpointError(f"{name} is not a complete HunyuanVideo-1.5 VAE: it has a decoder alone.")
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
    """The decoder's tensors, mapped from the file, in diffusers' names without "decoder."."""
    found = _read(checkpoint, set(checkpoint.architecture.decoder_shapes()))
    return {key.removeprefix("decoder."): value for key, value in found.items()}


def all_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The decoder's tensors and the encoder's, if there is one, mapped from the file, in diffusers' names."""
    architecture = checkpoint.architecture
    encoder = architecture.encoder_shapes() if checkpoint.has_encoder else {}
    return _read(checkpoint, architecture.decoder_shapes().keys() | encoder.keys())


def _read(checkpoint: Checkpoint, names: set[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in checkpoint.files:
        with _open(file) as tensors:
            keys = {to_diffusers(key): key for key in tensors.keys()}  # noqa: SIM118  not a mapping
            found |= {name: tensors.get_tensor(key) for name, key in keys.items() if name in names}
    return found


def _is_handed_over(path: Path) -> bool:
    """Whether this is an open file of a process of ours (see `handover.SharedWeights`), which has no name to go by."""
    return re.fullmatch(r"/proc/\d+/fd/\d+", str(path)) is not None


def _files(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        _check_class(folder)
        index = folder / f"diffusion_pytorch_model{INDEX}"
        if index.is_file():
            return _shards(index)
        file = folder / "diffusion_pytorch_model.safetensors"
        if file.is_file():
            return (file,)
        others = sorted(folder.glob("*.safetensors"))
        if len(others) == 1:  # a variant, such as diffusion_pytorch_model.fp16.safetensors
            return (others[0],)
        raise CheckpointError(f"The folder {printable(folder.name)} has no {file.name}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {printable(path.name)}.")
    if path.name.endswith(INDEX):
        return _shards(path)
    if path.suffix != ".safetensors" and not _is_handed_over(path):
        raise CheckpointError(
            f"{printable(path.name)} is not a .safetensors file; other formats can run code and are not read."
        )
    return (path,)


def _check_class(folder: Path) -> None:
    """Some models share this one's keys and shapes; a diffusers folder says which model it is."""
    config = folder / "config.json"
    if config.is_file():
        found = _json(config).get("_class_name", DIFFUSERS_CLASS)
        if found != DIFFUSERS_CLASS:
            model = quote(found) if isinstance(found, str) else "model without a class name"
            raise CheckpointError(
                f"The folder {printable(folder.name)} holds a {model}, not HunyuanVideo-1.5's {DIFFUSERS_CLASS}."
            )


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index lists, all of them beside it."""
    shards = _json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{printable(index.name)} has no weight_map that names the files.")
    files = tuple(index.parent / Path(name).name for name in sorted(set(shards.values())))
    missing = [file.name for file in files if file.suffix != ".safetensors" or not _is_file(file)]
    if missing:
        raise CheckpointError(f"{printable(index.name)} names files that are not there: {first_names(missing)}.")
    return files


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _json(path: Path) -> dict:
    name = printable(path.name)
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{name} has more than {JSON_LIMIT / 2**20:g} MiB; it is no config or index.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{name} cannot be read as JSON: {printable(error)}") from error
    except RecursionError as error:
        raise CheckpointError(f"{name} cannot be read as JSON: it is nested too deeply.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} holds no JSON object.")
    return found


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{printable(file.name)} cannot be read as safetensors ({printable(error)}). "
            "It may be truncated, or a renamed file of another format."
        ) from error
