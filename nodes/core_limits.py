"""What ranks cannot compute in a graph of core's nodes. Such a sampling runs in ComfyUI's process instead."""

from collections.abc import Mapping

import comfy.model_patcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

CONDITIONS = {
    "control": "a ControlNet",
    "hooks": "hooks on the conditioning, such as a scheduled LoRA",
    "gligen": "GLIGEN",
    "reference_latents": "reference latents",
    "guiding_frame_index": "a guiding frame",
}
"""Entries of a conditioning that change the network's computation, with what messages call them."""


def reason_to_stay(
    patcher: comfy.model_patcher.ModelPatcher, conds: Mapping[str, list], options: Mapping, loading: Mapping
) -> str | None:
    """Return what ranks cannot compute in this sampling, as a noun phrase, or None.

    conds: by name, the lists of conditionings. options: the run's model options. loading: further arguments of
    core's `prepare_sampling`.
    """
    own = sorted(name for name in patcher.object_patches if name.startswith("diffusion_model."))
    if own:
        return f"patches of the network's own parts ({', '.join(own[:3])})"
    if any(patcher.injections.values()):
        return "injections into the network, such as a LoRA in bypass mode"
    if patcher.weight_wrapper_patches:
        return "wrappers around the weights"
    if patcher.get_all_callbacks(CallbacksMP.ON_LOAD):
        return "callbacks that change the network when it is loaded"
    if patcher.additional_models.get("multigpu") or options.get("multigpu_clones"):
        return "ComfyUI's own MultiGPU clones"
    transformer = options.get("transformer_options", {})
    for name in ("patches", "patches_replace"):
        if used := sorted(key for key, value in transformer.get(name, {}).items() if value):
            return f"replaced or patched blocks ({', '.join(used)})"
    for cond in (cond for conds_ in conds.values() for cond in conds_ or ()):
        for name, words in CONDITIONS.items():
            if cond.get(name) is not None:
                return words
        mask = cond.get("attention_mask")
        if isinstance(mask, Tensor) and not (mask == 1).all() and _is_additive(mask):
            return "a text mask that is added to attention scores"
    if any(loading.values()):
        return "a forced load of the model"
    return None


def _is_additive(mask: Tensor) -> bool:
    """Return whether core adds a mask to attention scores, instead of selecting tokens with it."""
    return mask.is_floating_point() or not ((mask == 0) | (mask == 1)).all()
