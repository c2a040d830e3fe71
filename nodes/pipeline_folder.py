"""Checks of a diffusers folder before anything in it is loaded: is it a whole HunyuanVideo-1.5 pipeline, and only that?

A folder comes from strangers. diffusers imports what its model_index.json names, some versions run Python files beside
the weights, a format other than safetensors can hold code, and a config can ask for more than any machine has.
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
"""The parts with weights that both pipelines have, and the library of each."""

CLASSES = {"transformer": "HunyuanVideo15Transformer3DModel", "vae": "AutoencoderKLHunyuanVideo15"}
"""Classes without which a pipeline of that name is not one."""

WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""What each library calls a part's weights, before .safetensors."""

JSON_BYTES = 2**20
COUNTS = re.compile(r"layers|blocks|depth")
"""Names of numbers that say how often something with weights of its own is there."""
MOST_LAYERS = 1000
"""Where a part has fewer tensors: some configs have such numbers for layers that are not there."""
MOST_TIMESTEPS = 1_000_000


def check_folder(folder: Path) -> str:
    """The class of the pipeline in the folder. Raises ValueError unless it is a complete HunyuanVideo-1.5 pipeline."""
    index = _read_json(folder, "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"{folder.name} holds {quote(name)}; this node loads {' and '.join(PIPELINES)}.")
    missing = [part for part in PARTS if part not in index]
    if missing:
        raise ValueError(f"{folder.name}/model_index.json has no {missing[0]}; a {name} has one.")
    code = next((path for path in (*folder.glob("*.py"), *folder.glob("*/*.py"))), None)
    if code:
        raise ValueError(f"{folder.name} holds code, {quote(code.relative_to(folder))}, which a model has not.")
    for part, value in index.items():
        if not part.startswith("_"):
            _check_part(folder, name, part, value)
    return name


def _check_part(folder: Path, pipeline: str, part: str, value: object) -> None:
    """Refuse a part that is not of the two libraries, not of the class that it has to be, or not whole."""
    where = f"{folder.name}/model_index.json"
    if not re.fullmatch(r"\w{1,64}", part):
        raise ValueError(f"{where} has a part of the name {quote(part)}.")
    if isinstance(value, (bool, int, float)) and part not in PARTS:
        return  # a setting of the pipeline
    if value in ([None, None], None):
        if part in PARTS:
            raise ValueError(f"{where} has no {part}; a {pipeline} has one.")
        return
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)):
        raise ValueError(f"{where}: its {part} is {quote(value)}, where a library and a class belong.")
    library, kind = value
    if library not in LIBRARIES or not re.fullmatch(r"[A-Z]\w{1,99}", kind) or re.match("Auto(?!encoder)", kind):
        raise ValueError(
            f"{where}: its {part} is {quote(kind)} of {quote(library)}; only classes of diffusers and transformers "
            "are loaded."
        )
    if kind != CLASSES.get(part, kind):
        raise ValueError(f"{folder.name}: its {part} is {kind}; a {pipeline} has a {CLASSES[part]}.")
    if library != PARTS.get(part, library):
        raise ValueError(f"{where}: its {part} is of {library}; a {pipeline} has one of {PARTS[part]}.")
    if not (folder / part).is_dir():
        raise ValueError(f"{folder.name} has no folder {part}, where its {kind} belongs.")
    if part in PARTS or part == "image_encoder":
        _check_config(folder, f"{part}/config.json", _count_tensors(folder, part, WEIGHTS[library]))
    elif part == "scheduler":
        config = _read_json(folder, "scheduler/scheduler_config.json")
        numbers = [value for _, value in _values(config) if isinstance(value, int) and value > MOST_TIMESTEPS]
        if numbers:
            raise ValueError(f"{folder.name}/scheduler/scheduler_config.json asks for {numbers[0]} steps.")


def _count_tensors(folder: Path, part: str, name: str) -> int:
    """How many tensors a part's weights have. Raises ValueError where they are not all there, as safetensors."""
    files = [f"{name}.safetensors"]
    index = f"{name}.safetensors.index.json"
    if (folder / part / index).is_file():
        shards = _read_json(folder, f"{part}/{index}").get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{folder.name}/{part}/{index} has no weight_map that names the files.")
        files = sorted(set(shards.values()))
        outside = [file for file in files if not re.fullmatch(r"[\w.-]+\.safetensors", file)]
        if outside:
            raise ValueError(f"{folder.name}/{part}/{index} names {quote(outside[0])}; only *.safetensors are read.")
    count = 0
    for file in files:
        path = folder / part / file
        if not path.is_file():
            by = f", which {index} names" if file != f"{name}.safetensors" else ""
            raise ValueError(f"{folder.name}/{part} has no {file}{by}.")
        try:
            with safe_open(path, framework="pt") as tensors:
                count += len(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder.name}/{part}/{file} cannot be read as safetensors ({error}).") from None
    return count


def _check_config(folder: Path, name: str, tensors: int) -> None:
    """Refuse a config that asks for more layers than there are tensors, or for code that is not the libraries'."""
    for key, value in _values(_read_json(folder, name)):
        count = len(value) if isinstance(value, list) else value
        if isinstance(count, int) and count > max(tensors, MOST_LAYERS) and (count is not value or COUNTS.search(key)):
            raise ValueError(
                f"{folder.name}/{name}: its {quote(key)} asks for {count} layers; the weights are {tensors} tensors."
            )
        if key == "auto_map" or (key.endswith("implementation") and isinstance(value, str) and "/" in value):
            raise ValueError(f"{folder.name}/{name} names code to run, {quote(key)}; only weights are loaded.")


def _values(config: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Each value in a config with its key, mappings and lists included, however deep."""
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
        list(_values(found))  # as deep as anybody will look into it
    except FileNotFoundError:
        raise ValueError(f"{folder.name} has no {name}; a HunyuanVideo-1.5 folder for diffusers has one.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{folder.name}/{name} cannot be read as JSON ({error}); download it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{folder.name}/{name} holds no JSON object; download it again.")
    return found
