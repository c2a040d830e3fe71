"""Checkpoints on disk: their files, and the shapes and dtypes of their tensors. Only safetensors files are read."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .quoting import first_names, printable, quote

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes of weights that every model may have, by their names in safetensors."""
ALL_DTYPES = DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""These, and the dtypes of a transformer's stored weights."""

INDEX = ".safetensors.index.json"
JSON_LIMIT = 16 * 2**20
"""Maximum size in bytes of a config or an index. Real ones have a few kilobytes."""

Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by name."""


def find_files(path: Path, part: str, diffusers_class: str) -> tuple[Path, ...]:
    """Return the files of a checkpoint: a .safetensors file, an index of several files, or a diffusers folder.

    part: the name of the component's folder in a diffusers pipeline. Raises CheckpointError, also for a folder whose
    config has another class than `diffusers_class`, and FileNotFoundError.
    """
    if path.is_dir():
        folder = part_folder(path, part)
        _check_class(folder, diffusers_class)
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


def part_folder(path: Path, part: str) -> Path:
    """Return the folder of a component of the diffusers pipeline at `path`, or `path` itself if there is none."""
    return path / part if (path / part).is_dir() else path


def identity_of(files: tuple[Path, ...]) -> str:
    """Return an identity of the files that changes if a path, size or modification time changes."""
    stats = [(path, path.stat()) for path in files]
    return "|".join(f"{path}:{s.st_size}:{s.st_mtime_ns}" for path, s in stats)


def name_of(path: Path, unnamed: str) -> str:
    """Return the name of a checkpoint in messages: its file name, or `unnamed` for shared memory, which has none."""
    return unnamed if _is_handed_over(path) else printable(path.name)


def describe_tensors(files: tuple[Path, ...]) -> tuple[Shapes, dict[str, torch.dtype | str]]:
    """Return the shapes and dtypes of all tensors in the files. Other dtypes than `ALL_DTYPES` are given by name."""
    shapes: Shapes = {}
    dtypes: dict[str, torch.dtype | str] = {}
    for file in files:
        with open_file(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  not a mapping
                header = tensors.get_slice(key)
                shapes[key] = tuple(header.get_shape())
                dtypes[key] = ALL_DTYPES.get(header.get_dtype(), header.get_dtype())
    return shapes, dtypes


def open_file(file: Path):
    """Map the tensors of a file. Raises CheckpointError for another format."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{printable(file.name)} cannot be read as safetensors ({printable(error)}). "
            "It may be truncated, or a renamed file of another format."
        ) from error


def problems(
    expected: Shapes,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, object] | None = None,
    usable: Mapping[str, torch.dtype] = DTYPES,
) -> list[str]:
    """Return a description of each problem: missing tensors, wrong shapes and dtypes that are not usable.

    dtypes: None: not checked.
    """
    missing = sorted(expected.keys() - shapes.keys())
    present = [key for key in expected if key in shapes]
    wrong = [key for key in present if expected[key] != shapes[key]]
    unusable = [key for key in present if dtypes is not None and dtypes[key] not in usable.values()]
    names = [str(dtype).removeprefix("torch.") for dtype in usable.values()]
    can = f"{', '.join(names[:-1])} and {names[-1]}"
    found = [f"lacks {first_names(missing)}"] * bool(missing)
    found += [f"has {quote(key)} of shape {shapes[key]} instead of {expected[key]}" for key in wrong[:3]]
    found += [f"has {quote(key)} as {dtypes[key]}; {can} can be used" for key in unusable[:1]]
    return found


def read_json(path: Path) -> dict:
    """Read a JSON object from a file. Raises CheckpointError if the file cannot be read or has another type."""
    name = printable(path.name)
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{name} has more than {JSON_LIMIT / 2**20:g} MiB; it is not a config or an index.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{name} cannot be read as JSON: {printable(error)}") from error
    except RecursionError as error:
        raise CheckpointError(f"{name} cannot be read as JSON: it is nested too deeply.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} does not contain a JSON object.")
    return found


def _is_handed_over(path: Path) -> bool:
    """Return whether this is a file descriptor of a process: shared memory that ranks map as a file."""
    return re.fullmatch(r"/proc/\d+/fd/\d+", str(path)) is not None


def _check_class(folder: Path, diffusers_class: str) -> None:
    """Check the class in a diffusers folder, because some models have the same keys and shapes as others."""
    config = folder / "config.json"
    if config.is_file():
        found = read_json(config).get("_class_name", diffusers_class)
        if found != diffusers_class:
            model = quote(found) if isinstance(found, str) else "model without a class name"
            raise CheckpointError(
                f"The folder {printable(folder.name)} holds a {model}, not HunyuanVideo-1.5's {diffusers_class}."
            )


def _shards(index: Path) -> tuple[Path, ...]:
    """Return the files that an index lists. Only files in the folder of the index are accepted."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{printable(index.name)} has no weight_map that lists the files.")
    files = tuple(index.parent / Path(name).name for name in sorted(set(shards.values())))
    missing = [file.name for file in files if file.suffix != ".safetensors" or not _is_file(file)]
    if missing:
        raise CheckpointError(f"{printable(index.name)} lists files that do not exist: {first_names(missing)}.")
    return files


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # not a valid file name
        return False
