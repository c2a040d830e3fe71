"""Checks that a diffusers folder is a complete HunyuanVideo-1.5 pipeline and nothing else, before it is loaded.

Folders come from untrusted sources. diffusers imports the modules that model_index.json names, some versions run Python
files next to the weights, formats other than safetensors can contain code, and a config can request more layers than
fit into memory.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..distributed.quoting import quote

PIPELINES = ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline")
LIBRARIES = ("diffusers", "transformers")
PARTS = {
    "transformer": "diffusers",
    "vae": "diffusers",
    "text_encoder": "transformers",
    "text_encoder_2": "transformers",
}
"""Components with weights that both pipelines have, and the library of each."""

CLASSES = {"transformer": "HunyuanVideo15Transformer3DModel", "vae": "AutoencoderKLHunyuanVideo15"}
"""Required class of a component."""

WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""File name of a component's weights in each library, without .safetensors."""

JSON_BYTES = 2**20
COUNTS = re.compile(r"layers|blocks|depth")
"""Config keys that hold a number of layers with weights of their own."""
MOST_LAYERS = 1000
"""Limit for a component with fewer tensors: some configs give such numbers for layers that do not exist."""
MOST_TIMESTEPS = 1_000_000


def check_folder(folder: Path) -> str:
    """Return the pipeline's class name. Raises ValueError if the folder is not a complete HunyuanVideo-1.5 pipeline."""
    index = _read_json(folder, "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"{folder.name} is a {quote(name)}; this node loads {' and '.join(PIPELINES)}.")
    missing = [part for part in PARTS if part not in index]
    if missing:
        raise ValueError(f"{folder.name}/model_index.json has no {missing[0]}, which a {name} needs.")
    code = next((path for path in (*folder.glob("*.py"), *folder.glob("*/*.py"))), None)
    if code:
        raise ValueError(f"{folder.name} contains code, {quote(code.relative_to(folder))}; a model folder must not.")
    for part, value in index.items():
        if not part.startswith("_"):
            _check_part(folder, name, part, value)
    return name


def _check_part(folder: Path, pipeline: str, part: str, value: object) -> None:
    """Raise ValueError for a component of another library or class, or one that is incomplete."""
    where = f"{folder.name}/model_index.json"
    if not re.fullmatch(r"\w{1,64}", part):
        raise ValueError(f"{where} has a component with the invalid name {quote(part)}.")
    if isinstance(value, (bool, int, float)) and part not in PARTS:
        return  # a setting of the pipeline
    if value in ([None, None], None):
        if part in PARTS:
            raise ValueError(f"{where} has no {part}, which a {pipeline} needs.")
        return
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)):
        raise ValueError(f"{where}: {part} is {quote(value)}; it must be a library and a class.")
    library, kind = value
    if library not in LIBRARIES or not re.fullmatch(r"[A-Z]\w{1,99}", kind) or re.match("Auto(?!encoder)", kind):
        raise ValueError(
            f"{where}: {part} is {quote(kind)} of {quote(library)}; only classes of diffusers and transformers "
            "are loaded."
        )
    if kind != CLASSES.get(part, kind):
        raise ValueError(f"{folder.name}: {part} is {kind}; a {pipeline} needs {CLASSES[part]}.")
    if library != PARTS.get(part, library):
        raise ValueError(f"{where}: {part} is a class of {library}; a {pipeline} needs one of {PARTS[part]}.")
    if not (folder / part).is_dir():
        raise ValueError(f"{folder.name} has no folder {part} with the {kind}.")
    if part in PARTS or part == "image_encoder":
        _check_config(folder, f"{part}/config.json", _count_tensors(folder, part, WEIGHTS[library]))
    elif part == "scheduler":
        config = _read_json(folder, "scheduler/scheduler_config.json")
        numbers = [value for _, value in _values(config) if isinstance(value, int) and value > MOST_TIMESTEPS]
        if numbers:
            raise ValueError(
                f"{folder.name}/scheduler/scheduler_config.json requests {numbers[0]} steps; "
                f"the limit is {MOST_TIMESTEPS}."
            )


def _count_tensors(folder: Path, part: str, name: str) -> int:
    """Return the number of tensors in a component's weights. Raises ValueError if a safetensors file is missing."""
    files = [f"{name}.safetensors"]
    index = f"{name}.safetensors.index.json"
    if (folder / part / index).is_file():
        shards = _read_json(folder, f"{part}/{index}").get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{folder.name}/{part}/{index} has no valid weight_map.")
        files = sorted(set(shards.values()))
        outside = [file for file in files if not re.fullmatch(r"[\w.-]+\.safetensors", file)]
        if outside:
            raise ValueError(f"{folder.name}/{part}/{index} names {quote(outside[0])}; only *.safetensors are read.")
    count = 0
    for file in files:
        path = folder / part / file
        if not path.is_file():
            named = f", which {index} lists" if file != f"{name}.safetensors" else ""
            raise ValueError(f"{folder.name}/{part} has no {file}{named}.")
        try:
            with safe_open(path, framework="pt") as tensors:
                count += len(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder.name}/{part}/{file} cannot be read as safetensors ({error}).") from None
    return count


def _check_config(folder: Path, name: str, tensors: int) -> None:
    """Raise ValueError for a config that requests more layers than there are tensors, or code outside the libraries."""
    for key, value in _values(_read_json(folder, name)):
        count = len(value) if isinstance(value, list) else value
        if isinstance(count, int) and count > max(tensors, MOST_LAYERS) and (count is not value or COUNTS.search(key)):
            raise ValueError(
                f"{folder.name}/{name}: {quote(key)} requests {count} layers; the weights have {tensors} tensors."
            )
        if key == "auto_map" or (key.endswith("implementation") and isinstance(value, str) and "/" in value):
            raise ValueError(f"{folder.name}/{name} refers to code in {quote(key)}; only weights are loaded.")


def _values(config: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield each value of a config with its key, at any depth; mappings and lists are values too."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield name, value
            yield from _values(value, name)
    elif isinstance(config, list):
        for value in config:
            yield from _values(value, key)
    else:
        yield key, config


def _read_json(folder: Path, name: str) -> dict:
    path = folder / name
    try:
        if path.stat().st_size > JSON_BYTES and not name.endswith(".index.json"):
            raise ValueError(f"{path.stat().st_size} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        list(_values(found))  # raises RecursionError if it is nested too deeply
    except FileNotFoundError:
        raise ValueError(
            f"{folder.name} has no {name}, which a HunyuanVideo-1.5 folder in diffusers format needs."
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{folder.name}/{name} cannot be read as JSON ({error}). Download it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{folder.name}/{name} is not a JSON object. Download it again.")
    return found
