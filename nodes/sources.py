"""From a VAE of ComfyUI's to the file that ranks map: its checkpoint, or its weights handed over."""

import logging
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path

import comfy.sd
import torch
from torch import Tensor

from ..distributed.errors import CheckpointError
from ..distributed.vae.checkpoint import decoder_tensors, open_checkpoint
from ..distributed.vae.handover import SAMPLES, SharedWeights, check_state_dict, fingerprint
from ..distributed.vae.hunyuanvideo15.layout import to_diffusers

log = logging.getLogger(__name__)


def rank_source(vae: comfy.sd.VAE) -> Path:
    """The file or folder that ranks map: the VAE's checkpoint, or where that is not known, its weights handed over.

    Weights in memory are written once, for all groups, until they change or their model is gone. Raises
    CheckpointError for a VAE that is not HunyuanVideo-1.5's, that was not loaded whole, or whose file was written over.
    """
    if getattr(vae, "source", None) is not None:
        try:
            if open_checkpoint(vae.source).identity == vae.source_identity:
                return vae.source
        except (CheckpointError, OSError):
            pass  # the file is gone or another by now
        overwritten = [file.name for file, inode in vae.source_inodes.items() if inode_of(file) == inode]
        if overwritten:  # its weights are mapped: to read them now could end this process
            raise CheckpointError(f"{overwritten[0]} was written over while it was loaded. Queue the prompt again.")
        # Where it was taken away, or replaced as downloads are, the VAE still has its weights.
    weights = vae.get_sd()
    layout = check_state_dict(weights)
    if (file := _core_file(vae)) and _holds(weights, file):
        return file
    model = vae.first_stage_model
    with _lock:
        mark = fingerprint(weights)
        handed = _handed.get(model)
        if handed is None or handed.mark != mark:
            log.info("Handing a HunyuanVideo-1.5 VAE in memory (%s layout) over to the ranks.", layout)
            handed = None
            _handed.pop(model, None)  # the file of the weights before goes before the next is written
            handed = _handed[model] = SharedWeights(weights, mark)
        return handed.path


_lock = threading.Lock()
_handed: "weakref.WeakKeyDictionary[torch.nn.Module, SharedWeights]" = weakref.WeakKeyDictionary()


def inode_of(file: Path) -> tuple[int, int] | None:
    """What stays the same where a file is written over, and does not where another takes its place."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _core_file(vae: comfy.sd.VAE) -> Path | None:
    """The file that core's VAELoader read, where core remembers it (0.33 does)."""
    match getattr(getattr(vae, "patcher", None), "cached_patcher_init", None):
        case (function, (str(file), *_)) if getattr(function, "__name__", "") == "load_vae_patcher":
            return Path(file)
    return None


def _holds(weights: Mapping[str, Tensor], file: Path) -> bool:
    """Whether the file's decoder, in the dtype of these weights, has the same numbers, in a sample of each tensor.

    A VAE may have been changed since it was loaded, the file may be another by now, and core's loader leaves weights of
    a layout that it cannot read as they were.
    """
    try:
        stored = decoder_tensors(open_checkpoint(file))
    except (CheckpointError, OSError):
        return False
    held = {to_diffusers(key).removeprefix("decoder."): tensor.detach() for key, tensor in weights.items()}
    return all(
        key in held and torch.equal(_sample(tensor).to(held[key].dtype), _sample(held[key]).cpu())
        for key, tensor in stored.items()
    )


def _sample(tensor: Tensor) -> Tensor:
    return tensor.flatten()[:: max(1, tensor.numel() // SAMPLES)]
