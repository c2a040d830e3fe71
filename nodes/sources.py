"""From ComfyUI's VAE object to the file that ranks map: its checkpoint, or a copy of its weights in shared memory."""

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
    """Return the file or folder that ranks map: the VAE's checkpoint, or a shared copy of its weights if it is unknown.

    Weights in memory are copied once for all groups, until they change or their model is deleted. Raises
    CheckpointError for a VAE of another model, an incompletely loaded VAE, and an overwritten file.
    """
    if getattr(vae, "source", None) is not None:
        try:
            if open_checkpoint(vae.source).identity == vae.source_identity:
                return vae.source
        except (CheckpointError, OSError):
            pass  # the file was removed or replaced
        overwritten = [file.name for file, inode in vae.source_inodes.items() if inode_of(file) == inode]
        if overwritten:  # its weights are mapped: reading them could kill this process with SIGBUS
            raise CheckpointError(f"{overwritten[0]} was overwritten while it was loaded. Queue the prompt again.")
        # If the file was deleted or replaced by another file, the VAE still has its weights.
    weights = vae.get_sd()
    layout = check_state_dict(weights)
    if (file := _core_file(vae)) and _holds(weights, file):
        return file
    model = vae.first_stage_model
    with _lock:
        mark = fingerprint(weights)
        shared = _shared.get(model)
        if shared is None or shared.mark != mark:
            log.info("Copying a HunyuanVideo-1.5 VAE in memory (%s layout) to the ranks.", layout)
            shared = None
            _shared.pop(model, None)  # frees the old copy before the new one is allocated
            shared = _shared[model] = SharedWeights(weights, mark)
        return shared.path


_lock = threading.Lock()
_shared: "weakref.WeakKeyDictionary[torch.nn.Module, SharedWeights]" = weakref.WeakKeyDictionary()


def inode_of(file: Path) -> tuple[int, int] | None:
    """Return device and inode, which stay the same if a file is overwritten in place and change if it is replaced."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _core_file(vae: comfy.sd.VAE) -> Path | None:
    """Return the file that core's VAELoader read, if core remembers it (0.33 does)."""
    match getattr(getattr(vae, "patcher", None), "cached_patcher_init", None):
        case (function, (str(file), *_)) if getattr(function, "__name__", "") == "load_vae_patcher":
            return Path(file)
    return None


def _holds(weights: Mapping[str, Tensor], file: Path) -> bool:
    """Return whether the file's decoder equals these weights, in their dtype, in a sample of each tensor.

    The VAE may have been changed since it was loaded, the file may have been replaced, and core's loader leaves weights
    uninitialised if it cannot read the file's layout.
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
