"""Import of diffusers and transformers when a node runs that needs them. The VAE nodes do not."""

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterator
from types import ModuleType

CLASSES = {
    "diffusers": ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline", "ClassifierFreeGuidance"),
    "transformers": ("Qwen2_5_VLTextModel", "T5EncoderModel"),
}
"""Classes that the pipeline nodes use, by library."""

NEEDED = "diffusers and transformers, as in the node pack's requirements.txt"


def diffusers() -> ModuleType:
    """Return the module. Raises RuntimeError with the installed versions if it cannot be used."""
    with explained():
        found = importlib.import_module("diffusers")
        for library, names in CLASSES.items():
            for name in names:
                getattr(importlib.import_module(library), name)  # both libraries import lazily
        return found


def check_transformer() -> None:
    """Raise RuntimeError with the installed versions if ranks cannot import diffusers' transformer."""
    with explained():
        importlib.import_module("diffusers").HunyuanVideo15Transformer3DModel  # noqa: B018 (imported lazily)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raise RuntimeError with the installed versions if the libraries are missing, too old or broken."""
    try:
        yield
    except (ImportError, AttributeError, RuntimeError) as error:  # a broken lazy import raises RuntimeError
        versions = ", ".join(f"{name} {_version(name)}" for name in ("diffusers", "transformers"))
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise RuntimeError(f"This node needs {NEEDED}. Installed: {versions} ({reason[0]}).") from error


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
