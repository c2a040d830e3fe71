"""Transfer of in-memory weights to the ranks: copied once to shared memory, which all ranks of a host map.

A VAE in memory may hold more tensors than a checkpoint, its modules may be wrapped, and its tensors may be on several
devices. Only the decoder's tensors are read.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quoting import quote
from ..shared_weights import SharedFile
from .hunyuanvideo15.layout import by_diffusers_name, check_tensors, read_architecture, recognise

SAMPLES = 64
"""Number of values per tensor that a fingerprint includes."""


class SharedWeights(SharedFile):
    """Weights copied to shared memory as a safetensors file that ranks map. `mark` identifies the weights.

    Raises CheckpointError as `open_checkpoint` does, and what `SharedFile` raises.
    """

    def __init__(self, weights: Mapping[str, Tensor], mark: str) -> None:
        self.mark = mark
        super().__init__(_decoder(weights), "hv15-vae")


def check_state_dict(state_dict: Mapping[str, Tensor]) -> str:
    """Check weights in memory and return their layout. Raises CheckpointError as `open_checkpoint` does."""
    _decoder(state_dict)
    return recognise({key: tuple(tensor.shape) for key, tensor in state_dict.items()}, "The VAE")


def _decoder(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check the state dict and return the decoder's tensors with diffusers' names."""
    odd = [key for key, tensor in state_dict.items() if not (isinstance(key, str) and isinstance(tensor, Tensor))]
    if odd:
        raise CheckpointError(f"The VAE is not a state dict: {quote(odd[0])} is not the name of a tensor.")
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    recognise(shapes, "The VAE")
    tensors = {name: state_dict[key] for name, key in by_diffusers_name(shapes, "The VAE").items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    needed = read_architecture(shapes, "The VAE").decoder_shapes()
    check_tensors(needed, shapes, {name: tensor.dtype for name, tensor in tensors.items()}, "The VAE")
    empty = [name for name in needed if tensors[name].is_meta]
    if empty:
        raise CheckpointError(f"The VAE was not loaded: its {quote(empty[0])} holds no numbers (meta device).")
    return {name: tensors[name] for name in needed}


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a hash of a sample of each of the decoder's tensors. It is cheap and does not depend on their devices.

    Raises CheckpointError as `check_state_dict` does, and if the sample shows that a tensor was never loaded: if a file
    has none of the expected keys, as in diffusers' layout, ComfyUI's loader only logs a warning and leaves the weights
    uninitialised.
    """
    decoder = dict(sorted(_decoder(weights).items()))
    samples = {key: t.detach().flatten()[:: max(1, t.numel() // SAMPLES)].float() for key, t in decoder.items()}
    numbers = _on_cpu(samples)
    for key, values in numbers.items():
        empty = key.endswith((".weight", ".gamma")) and not values.any() and not decoder[key].any()
        if empty or not values.isfinite().all():
            raise CheckpointError(
                f"The VAE was not loaded completely: its {quote(key)} is {'all zeros' if empty else 'not finite'}. "
                "ComfyUI's own loader does not read diffusers' layout; load the file with Load HunyuanVideo-1.5 VAE."
            )
    return hashlib.sha256(torch.cat(list(numbers.values())).numpy().tobytes()).hexdigest()


def _on_cpu(samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, with one transfer per device."""
    moved: dict[str, Tensor] = {}
    for device in {tensor.device for tensor in samples.values()}:
        here = {key: tensor for key, tensor in samples.items() if tensor.device == device}
        numbers = torch.cat(list(here.values())).cpu().split([len(tensor) for tensor in here.values()])
        moved |= zip(here, numbers, strict=True)
    return {key: moved[key] for key in samples}
