"""Checkpoints of the transformer on disk, checked tensor by tensor, and their weights, mapped from the files.

All ranks of a machine map the same files: there is one copy in the host's memory, the system's page cache.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quoting import first_names, printable
from ..safetensors_files import (
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
    Architecture,
    architecture_of_config,
    architecture_of_shapes,
    modulates,
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
    """"diffusers" or "core"."""
    architecture: Architecture
    identity: str
    """Changes when the files do."""

    @cached_property
    def parameters(self) -> int:
        """How many numbers its weights are."""
        return sum(map(math.prod, self.architecture.shapes().values()))

    @cached_property
    def modulation_parameters(self) -> int:
        """How many of these serve the modulation and nothing else."""
        return sum(math.prod(shape) for name, shape in self.architecture.shapes().items() if modulates(name))


def open_transformer(path: str | os.PathLike) -> TransformerCheckpoint:
    """Recognise and check a transformer: a diffusers folder (the pipeline's or its own), or a file of either layout.

    A file in diffusers' layout needs its config.json beside it. Raises CheckpointError with what is wrong,
    FileNotFoundError where there is nothing.
    """
    path = Path(path).absolute()  # ranks have another working directory
    files = find_files(path, "transformer", DIFFUSERS_CLASS)
    shapes, dtypes = describe_tensors(files)
    name = name_of(path, "The transformer")
    names = original_names(shapes, name)
    layout = recognise(names.keys(), name)
    shapes, dtypes = ({new: found[key] for new, key in names.items()} for found in (shapes, dtypes))
    if layout == "diffusers":
        folder = part_folder(path, "transformer") if path.is_dir() else path.parent
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{name} is in diffusers' layout and has no config.json beside it.")
        architecture = architecture_of_config(read_json(folder / "config.json"), name)
    else:
        architecture = architecture_of_shapes(shapes, name)
    if architecture.layers + architecture.refiner_layers > len(shapes):
        raise CheckpointError(
            f"{name} is not a complete HunyuanVideo-1.5 transformer: its config asks for {architecture.layers} and "
            f"{architecture.refiner_layers} layers, and it has {len(shapes)} tensors."
        )
    expected = _expected(architecture, layout)
    if found := problems(expected, shapes, dtypes):
        raise CheckpointError(f"{name} is not a complete HunyuanVideo-1.5 transformer: it {'; it '.join(found)}.")
    if further := sorted(shapes.keys() - expected.keys()):
        raise CheckpointError(
            f"{name} is not a HunyuanVideo-1.5 transformer: it has further tensors ({first_names(further)})."
        )
    return TransformerCheckpoint(path, files, layout, architecture, identity_of(files))


def _expected(architecture: Architecture, layout: str) -> Shapes:
    """Shapes of all tensors in the names of a layout."""
    if layout == "diffusers":
        return architecture.shapes()
    expected: Shapes = {}
    for name, (rows, *rest) in architecture.shapes().items():
        source = source_of(name)
        expected[source.key] = (rows if source.third is None else 3 * rows, *rest)
    return expected


def mapped_tensors(checkpoint: TransformerCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """All tensors, mapped from the files, by their names in diffusers' layout."""
    wanted = checkpoint.architecture.shapes()
    sources: dict[str, list[str]] = {}
    for name in wanted:
        key = name if checkpoint.layout == "diffusers" else source_of(name).key
        sources.setdefault(key, []).append(name)
    for file in checkpoint.files:
        with open_file(file) as tensors:
            for new, key in original_names(tensors.keys(), printable(file.name)).items():
                whole = tensors.get_tensor(key)
                for name in sources.get(new, ()):
                    yield name, whole if checkpoint.layout == "diffusers" else _part(whole, name)


def _part(whole: Tensor, name: str) -> Tensor:
    """What diffusers calls `name`, of a tensor of the original layout."""
    source = source_of(name)
    if source.swapped:
        return torch.cat(whole.chunk(2)[::-1])
    return whole if source.third is None else whole.chunk(3)[source.third]
