"""Checkpoints of the transformer on disk, checked tensor by tensor, and their weights, mapped from the files.

All ranks of a machine map the same files: there is one copy in the host's memory, the system's page cache. Files of the
original layout may store weights in 8 bits, with or without a scale for each layer (`fp8_scaled`).
"""

import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quoting import first_names, printable, quote
from ..safetensors_files import (
    ALL_DTYPES,
    DTYPES,
    Shapes,
    describe_tensors,
    find_files,
    identity_of,
    name_of,
    open_file,
    part_folder,
    problems,
    read_json,
)
from .layout import (
    DIFFUSERS_CLASS,
    FURTHER_LAYERS,
    SCALE,
    Architecture,
    architecture_of_config,
    architecture_of_shapes,
    original_names,
    recognise,
    source_of,
)


@dataclass(frozen=True)
class TransformerCheckpoint:
    """A transformer on disk that was recognised and checked."""

    path: Path
    files: tuple[Path, ...]
    layout: str
    """"diffusers", "core" or "tencent"."""
    architecture: Architecture
    identity: str
    """Changes when the files do."""

    def at(self, path: Path) -> "TransformerCheckpoint":
        """Return the same checkpoint, whose path in this process is `path`."""
        return self if path == self.path else replace(self, path=path, files=(path,))


def open_transformer(path: str | os.PathLike) -> TransformerCheckpoint:
    """Recognise and check a transformer: a diffusers folder (the pipeline's or its own), or a file of any layout.

    A file in diffusers' layout needs its config.json beside it. Raises CheckpointError with what is wrong,
    FileNotFoundError where there is nothing.
    """
    path = Path(path).absolute()  # ranks have another working directory
    files = find_files(path, "transformer", DIFFUSERS_CLASS)
    shapes, dtypes = describe_tensors(files)
    name = name_of(path, "The transformer")
    names = original_names(shapes, name)
    layout = recognise(names.keys(), name)
    if layout != "diffusers":
        architecture = architecture_of_core(shapes, name)
        scales = [key for new, key in names.items() if new.endswith(f".weight{SCALE}")]
        _check_scales(files, {key: shapes[key] for key in scales}, name)
    shapes, dtypes = ({new: found[key] for new, key in names.items()} for found in (shapes, dtypes))
    if layout == "diffusers":
        config = (part_folder(path, "transformer") if path.is_dir() else path.parent) / "config.json"
        if not config.is_file():
            raise CheckpointError(f"{name} is in diffusers' layout and has no config.json beside it.")
        architecture = architecture_of_config(read_json(config), name)
        if architecture.layers + architecture.refiner_layers > len(shapes):
            raise CheckpointError(
                f"{name} is not a complete HunyuanVideo-1.5 transformer: its config asks for {architecture.layers} and "
                f"{architecture.refiner_layers} layers, and it has {len(shapes)} tensors."
            )
        if further := sorted(shapes.keys() - architecture.shapes().keys()):
            raise _further(name, further)
    expected, usable = (
        (architecture.shapes(), DTYPES) if layout == "diffusers" else (core_shapes(architecture, layout), ALL_DTYPES)
    )
    _refuse(problems(expected, shapes, dtypes, usable), name)
    identity = identity_of((*files, config) if layout == "diffusers" else files)
    return TransformerCheckpoint(path, files, layout, architecture, identity)


def architecture_of_core(shapes: Mapping[str, tuple[int, ...]], name: str) -> Architecture:
    """Return the sizes of a transformer in core's or Tencent's layout from its shapes, and check that it is whole.

    Prefixes are accepted, and tensors that it does not read are ignored. Raises CheckpointError if it is another model
    or lacks tensors; `name` is what messages call it.
    """
    names = original_names(shapes, name)
    if (layout := recognise(names.keys(), name)) == "diffusers":
        raise CheckpointError(f"{name} has the keys of diffusers' layout, not those of ComfyUI's.")
    if further := sorted(key for key in names if key.startswith(FURTHER_LAYERS)):
        raise _further(name, further)
    shapes = {new: tuple(shapes[key]) for new, key in names.items()}
    architecture = architecture_of_shapes(shapes, name)
    _refuse(problems(core_shapes(architecture, layout), shapes), name)
    return architecture


def _refuse(found: list[str], name: str) -> None:
    if found:
        raise CheckpointError(f"{name} is not a complete HunyuanVideo-1.5 transformer: it {'; it '.join(found)}.")


def _further(name: str, further: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{name} is not a HunyuanVideo-1.5 transformer: it has further tensors ({first_names(further)})."
    )


def _check_scales(files: tuple[Path, ...], shapes: Shapes, name: str) -> None:
    """Refuse scales that are not one finite number for a layer, as block-wise formats (MXFP8) have."""
    for key, shape in shapes.items():
        if shape not in ((), (1,)):
            raise CheckpointError(f"{name} has {quote(key)} of shape {shape}; one scale for each layer can be used.")
    for file in files:
        with open_file(file) as tensors:
            for key in shapes.keys() & set(tensors.keys()):
                if not math.isfinite(found := tensors.get_tensor(key).float().item()):
                    raise CheckpointError(f"{name} has {quote(key)} of {found}; a scale must be a finite number.")


def core_shapes(architecture: Architecture, layout: str = "core") -> Shapes:
    """Return the shapes of all tensors by the keys of core's or Tencent's layout."""
    expected: Shapes = {}
    for name, (rows, *rest) in architecture.shapes().items():
        source = source_of(name, layout)
        expected[source.key] = (rows if source.third is None else 3 * rows, *rest)
    return expected


class Stored(NamedTuple):
    """A tensor as a file stores it, and the scale that its values are multiplied by."""

    tensor: Tensor
    scale: Tensor | None = None

    @property
    def in_8_bits(self) -> bool:
        return self.tensor.dtype.itemsize == 1

    def to_host(self) -> "Stored":
        """Return the same values on the CPU."""
        return Stored(self.tensor.cpu(), self.scale)

    def to(self, device: torch.device, dtype: torch.dtype, copy: bool = False) -> Tensor:
        """Return the values. copy: never the stored tensor itself.

        Weight and scale are rounded to the dtype, and then their product is. Core's layers do the same if they do not
        compute in 8 bits: `scaled_fp8_ops` in ComfyUI 0.3.75, where small inputs are multiplied instead of the weight,
        and `dequantize_per_tensor_fp8` of later versions.
        """
        moved = self.tensor.to(device).to(dtype)  # in one call, the host would convert and more bytes would be moved
        if copy and moved is self.tensor:
            moved = moved.clone()
        return moved if self.scale is None else moved * self.scale.to(device, dtype)


def stored_tensors(
    checkpoint: TransformerCheckpoint, keys: Collection[str] | None = None
) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors that the transformer reads, mapped from the files, by their keys in the checkpoint's layout.

    keys: only these. They are without prefix, in the spelling of `original_names`.
    """
    wanted = sources(checkpoint).keys() if keys is None else sources(checkpoint).keys() & set(keys)
    scales: dict[str, Tensor] = {}
    for file in checkpoint.files if checkpoint.layout != "diffusers" else ():
        with open_file(file) as tensors:
            names = original_names(tensors.keys(), printable(file.name))
            scales |= {key + SCALE: tensors.get_tensor(names[key + SCALE]) for key in wanted if key + SCALE in names}
    for file in checkpoint.files:
        with open_file(file) as tensors:
            for new, key in original_names(tensors.keys(), printable(file.name)).items():
                if new in wanted:
                    yield new, Stored(tensors.get_tensor(key), scales.get(new + SCALE))


def sources(checkpoint: TransformerCheckpoint) -> dict[str, list[str]]:
    """Return the keys of the checkpoint's layout, each with the names in diffusers' layout of what it contains."""
    found: dict[str, list[str]] = {}
    layout = checkpoint.layout
    for name in checkpoint.architecture.shapes():
        found.setdefault(name if layout == "diffusers" else source_of(name, layout).key, []).append(name)
    return found


def part_of(whole: Tensor, name: str, layout: str) -> Tensor:
    """Return what diffusers calls `name`, of a whole tensor of a layout."""
    if layout == "diffusers":
        return whole
    source = source_of(name, layout)
    if source.swapped:
        return torch.cat(whole.chunk(2)[::-1])
    return whole if source.third is None else whole.chunk(3)[source.third]
