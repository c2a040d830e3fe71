"""diffusers and transformers, which only the pipeline nodes need. Imported when one of those nodes runs."""

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterator
from types import ModuleType

CLASSES = {
    "diffusers": ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline", "ClassifierFreeGuidance"),
    "transformers": ("Qwen2_5_VLTextModel", "T5EncoderModel"),
}
"""What the pipeline nodes use of each library."""

NEEDED = "diffusers and transformers, as in the node pack's requirements.txt"


def diffusers() -> ModuleType:
    """The module. Raises RuntimeError, with the versions that are there, where it cannot be used."""
    with explained():
        found = importlib.import_module("diffusers")
        for library, names in CLASSES.items():
            for name in names:
                getattr(importlib.import_module(library), name)  # imported when it is asked for
        return found


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say what is lacking where the libraries are missing, too old or broken."""
    try:
        yield
    except (ImportError, AttributeError, RuntimeError) as error:  # diffusers raises RuntimeError for a broken module
        versions = ", ".join(f"{name} {_version(name)}" for name in ("diffusers", "transformers"))
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise RuntimeError(f"This node needs {NEEDED}. Here: {versions} ({reason[0]}).") from error


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"
