"""The models that the loaders list, and the path of each."""

import logging
from pathlib import Path

import folder_paths

from ..miniature.folder import ensure_folder
from .libraries import explained

log = logging.getLogger(__name__)

TINY = {"tiny (built in)": "t2v", "tiny i2v (built in)": "i2v"}
"""Kind of each built-in model, by its name in the lists."""


def tiny_folder(name: str) -> Path:
    """Return the folder of the built-in model of that name, which is created on first use.

    It is stored in ComfyUI's user folder, or in the temporary folder if the user folder is not writable.
    """
    with explained():
        try:
            return ensure_folder(TINY[name], Path(folder_paths.get_user_directory()) / "hv15_tiny")
        except OSError as error:
            folder = Path(folder_paths.get_temp_directory()) / "hv15_tiny"
            log.warning("The user folder is not writable (%s). The built-in model is stored in %s.", error, folder)
            return ensure_folder(TINY[name], folder)


def vae_choices() -> list[str]:
    """Return the names in the list: the built-in model, files in models/vae, VAE folders in models/diffusers."""
    files = [name for name in folder_paths.get_filename_list("vae") if name.endswith(".safetensors")]
    return [next(iter(TINY)), *files, *vae_folders()]


def vae_folders() -> dict[str, Path]:
    """Return the VAE folders in models/diffusers by their name in the list: VAEs, and the VAEs of pipelines."""
    found: dict[str, Path] = {}
    for child in _diffusers_children():
        for name, folder in ((f"{child.name}/vae", child / "vae"), (child.name, child)):
            if any(folder.glob("diffusion_pytorch_model*.safetensors")):
                found.setdefault(name, folder)
    return found


def vae_path(name: str) -> Path:
    """Return the file or folder of the VAE with this name."""
    if name in TINY:
        return tiny_folder(name) / "vae"
    if folder := vae_folders().get(name):
        return folder
    return Path(folder_paths.get_full_path_or_raise("vae", name))


def diffusers_folders() -> list[Path]:
    """Return the folders in models/diffusers that contain a pipeline."""
    return [child for child in _diffusers_children() if (child / "model_index.json").is_file()]


def model_folder(name: str) -> Path:
    """Return the folder of the pipeline with this name. Raises ValueError if there is none."""
    if name in TINY:
        return tiny_folder(name)
    folder = next((folder for folder in diffusers_folders() if folder.name == name), None)
    if folder is None:
        raise ValueError(f"models/diffusers has no folder {name} with a model_index.json.")
    return folder


def _diffusers_children() -> list[Path]:
    parents = [Path(parent) for parent in folder_paths.get_folder_paths("diffusers")]
    return [child for parent in parents if parent.is_dir() for child in sorted(parent.iterdir())]
