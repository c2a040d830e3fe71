"""The built-in models as folders in diffusers' format, which load like real checkpoints."""

import os
import shutil
import tempfile
from pathlib import Path

VERSION = 4
"""Part of the folder's name. Increase it when the weights change."""


def ensure_folder(kind: str, parent: Path) -> Path:
    """Return the folder of the built-in pipeline, "t2v" or "i2v", in `parent`. It is created if it does not exist.

    Several processes may call this at once: the folder is created atomically. Raises OSError.
    """
    folder = parent / f"hv15-tiny-{kind}-v{VERSION}"
    if not folder.is_dir():
        from .parts import pipeline  # imports diffusers and transformers, which may be missing

        parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".hv15-tiny-", dir=parent))
        try:
            pipeline(kind).save_pretrained(draft)
            os.rename(draft, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has created it
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder
