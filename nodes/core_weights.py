"""The weights of a core MODEL, and its weight patches such as LoRA, in the form that ranks load.

Both stay what they are in ComfyUI: nothing is loaded onto a device or patched for this.
"""

import contextlib
import uuid
import weakref
from collections.abc import Iterable
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.weight_adapter import LoKrAdapter, LoRAAdapter
from torch import Tensor, nn

from ..distributed.denoise.handover import SharedTransformer, share_transformer
from ..distributed.denoise.merge import Patch
from ..distributed.denoise.patches import Patches
from ..distributed.denoise.weights import TransformerCheckpoint, architecture_of_core, open_transformer
from ..distributed.errors import CheckpointError
from .sources import inode_of

NETWORK = "diffusion_model."
"""Prefix of the network's keys in a MODEL."""
KEPT_PATCHES = 2
"""Number of sets of patches that are kept per model, so that two strengths can be compared without a new transfer."""

_inodes: "weakref.WeakKeyDictionary[nn.Module, tuple[int, int] | None]" = weakref.WeakKeyDictionary()
"""For each model, device and inode of its file at the first call of `file_of`."""
_shared: "weakref.WeakKeyDictionary[nn.Module, SharedTransformer]" = weakref.WeakKeyDictionary()
_patches: "weakref.WeakKeyDictionary[nn.Module, dict[object, Patches]]" = weakref.WeakKeyDictionary()


def network_of(patcher: comfy.model_patcher.ModelPatcher) -> nn.Module:
    """Return the network of a MODEL, without the wrapper of torch.compile."""
    network = patcher.model.diffusion_model
    return getattr(network, "_orig_mod", network)


def check_model(patcher: object) -> None:
    """Raise ValueError for anything but a HunyuanVideo-1.5 transformer, with the name of what it is."""
    network = getattr(getattr(patcher, "model", None), "diffusion_model", None)
    if not isinstance(network, nn.Module):
        raise ValueError("The model input contains no diffusion model. Connect the MODEL of a loader.")
    shapes = {key: tuple(tensor.shape) for key, tensor in network_of(patcher).state_dict().items()}
    try:
        architecture_of_core(shapes, f"The model ({type(patcher.model).__name__})")
    except CheckpointError as error:
        raise ValueError(str(error)) from error


def file_of(patcher: comfy.model_patcher.ModelPatcher) -> str | None:
    """Return the file that a MODEL's weights were loaded from unchanged, if ComfyUI keeps it (since 0.33).

    None if another file has replaced it since the first call for this model.
    """
    loader, arguments, *_ = getattr(patcher, "cached_patcher_init", None) or (None, ())
    name = getattr(loader, "__name__", "")
    if name == "load_diffusion_model":
        path, options = arguments
        if options.get("dtype") is not None:
            return None
    elif name == "load_checkpoint_guess_config":
        path = arguments[0]
    else:
        return None
    inode = inode_of(Path(path))
    return path if _inodes.setdefault(patcher.model, inode) == inode else None


def checkpoint_of(patcher: comfy.model_patcher.ModelPatcher) -> TransformerCheckpoint:
    """Return a MODEL's weights without its patches: the file, or a copy in shared memory, which is made once.

    Raises CheckpointError, MemoryError and OSError.
    """
    if (path := file_of(patcher)) is not None:
        with contextlib.suppress(CheckpointError, OSError):  # a file that only core's loader can read
            checkpoint = open_transformer(path)
            if checkpoint.layout == "core":  # patches have the names of this layout
                return checkpoint
    model = patcher.model
    if model not in _shared:
        tensors = network_of(patcher).state_dict()
        tensors = {key: _unpatched(patcher, NETWORK + key, tensor) for key, tensor in tensors.items()}
        _shared[model] = share_transformer(tensors, mark=uuid.uuid4().hex)
    return _shared[model].checkpoint


def _unpatched(patcher: comfy.model_patcher.ModelPatcher, key: str, tensor: Tensor) -> Tensor:
    """Return a tensor of the MODEL as it was before a loaded clone patched it in place."""
    backup = patcher.backup.get(key)
    return tensor if backup is None else backup.weight


def patches_of(patcher: comfy.model_patcher.ModelPatcher, checkpoint: TransformerCheckpoint) -> Patches | None:
    """Return a MODEL's weight patches, or None.

    Core merges here what ranks cannot: kinds that they do not know, and patches that do not fit, which core skips.
    """
    if not any(key.startswith(NETWORK) for key in patcher.patches):
        return None
    kept = _patches.setdefault(patcher.model, {})
    if patcher.patches_uuid not in kept:
        shapes = {NETWORK + key: tuple(tensor.shape) for key, tensor in network_of(patcher).state_dict().items()}
        named = {
            key.removeprefix(NETWORK): _converted(patches, shapes[key]) or [_merged(patcher, key)]
            for key, patches in patcher.patches.items()
            if key.startswith(NETWORK) and patches
        }
        before = next(reversed(kept.values()), None)
        kept[patcher.patches_uuid] = Patches.make(checkpoint, named, _merge_dtype(patcher), before)
        for oldest in list(kept)[:-KEPT_PATCHES]:
            del kept[oldest]
    return kept[patcher.patches_uuid]


def _merge_dtype(patcher: comfy.model_patcher.ModelPatcher) -> torch.dtype:
    """Return the dtype in which core merges patches: float32 in older versions, else chosen by the device."""
    chosen = getattr(comfy.model_management, "lora_compute_dtype", None)
    return torch.float32 if chosen is None else chosen(patcher.load_device)


def _converted(patches: Iterable[tuple], shape: tuple[int, ...]) -> list[Patch] | None:
    """Return the patches of a weight of this shape as ranks merge them, or None if they cannot merge one of them."""
    found = []
    for strength, value, strength_model, offset, function in patches:
        converted = None if offset is not None or function is not None else _patch(value, strength, strength_model)
        if converted is None:
            return None
        try:
            converted.check(shape)
        except ValueError:
            return None
        found.append(converted)
    return found


def _patch(value: object, strength: float, strength_model: float) -> Patch | None:
    if type(value) is LoRAAdapter and value.weights[5] is None:
        names, alpha = ("up", "down", None, "mid", "dora_scale"), value.weights[2]
        kind = "lora"
    elif type(value) is LoKrAdapter:
        names, alpha = ("w1", "w2", None, "w1_a", "w1_b", "w2_a", "w2_b", "t2", "dora_scale"), value.weights[2]
        kind = "lokr"
    elif isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], Tensor):
        return Patch("diff", strength, strength_model, {"diff": value[0]})
    elif isinstance(value, tuple) and len(value) == 2 and value[0] == "diff" and len(value[1]) == 1:
        return Patch("diff", strength, strength_model, {"diff": value[1][0]})
    else:
        return None
    tensors = {
        name: tensor
        for name, tensor in zip(names, value.weights, strict=False)
        if name is not None and tensor is not None
    }
    return Patch(kind, strength, strength_model, tensors, None if alpha is None else float(alpha))


def _merged(patcher: comfy.model_patcher.ModelPatcher, key: str) -> Patch:
    """Return a whole tensor with its patches, merged by core on the CPU."""
    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    dense = _unpatched(patcher, key, weight).to("cpu", torch.float32, copy=True)
    if convert is not None:
        dense = convert(dense, inplace=True)
    merged = comfy.lora.calculate_weight(patcher.patches[key], dense, key)
    return Patch("set", 1.0, 1.0, {"value": merged})
