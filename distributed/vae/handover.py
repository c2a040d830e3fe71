"""Weights that exist only in memory, handed over to the ranks: written once, for all ranks of a host to map.

A VAE in memory may hold more than a checkpoint does, its modules may be wrapped, and its tensors may be on several
devices. Only what the decoder needs is looked at.
"""

import hashlib
import os
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..quoting import quote
from .hunyuanvideo15.layout import by_diffusers_name, check_tensors, read_architecture, recognise

SAMPLES = 64
"""Numbers of each tensor that its fingerprint is taken of."""


class SharedWeights:
    """Weights in memory, written to a file for ranks to map. `mark` says which they are (see `fingerprint`).

    The file goes with this object, at the latest with this process, for on Linux it has no name. Ranks that have mapped
    it keep what they have. Raises CheckpointError as `open_checkpoint` does.
    """

    def __init__(self, weights: Mapping[str, Tensor], mark: str) -> None:
        self.mark = mark
        folder = tempfile.TemporaryDirectory(prefix="hv15-vae-")
        remove = weakref.finalize(self, folder.cleanup)
        try:
            self.path = share_state_dict(weights, folder.name)
        except BaseException:
            remove()
            raise
        if sys.platform == "linux":
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            remove()
            self.path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
            weakref.finalize(self, os.close, descriptor)


def share_state_dict(state_dict: Mapping[str, Tensor], folder: str | os.PathLike, name: str = "vae") -> Path:
    """Hand over weights that exist only in memory: write their decoder once, for all ranks of a host to map.

    Either layout. Returns the file, readable by its owner alone. Raises CheckpointError as `open_checkpoint` does.
    """
    decoder = {key: tensor.detach().to("cpu").contiguous() for key, tensor in _decoder(state_dict).items()}
    path = Path(folder) / f"{name}.safetensors"
    # Made before it is filled: at no time may others read it.
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o600))
    try:
        save_file(decoder, path)
    except SafetensorError as error:
        raise OSError(f"The VAE cannot be handed over to the ranks: {error}") from error
    path.chmod(0o600)
    return path


def check_state_dict(state_dict: Mapping[str, Tensor]) -> str:
    """Return the layout of weights in memory. Raises CheckpointError as `open_checkpoint` does for a decoder."""
    _decoder(state_dict)
    return recognise({key: tuple(tensor.shape) for key, tensor in state_dict.items()}, "The VAE")


def _decoder(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the decoder needs, checked, in diffusers' names."""
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
    """Some numbers of every tensor that the decoder needs: cheap, and the same wherever the weights are moved.

    The weights may be on several devices. Raises CheckpointError for what `check_state_dict` refuses, and where the
    numbers show that a tensor was never loaded: core only warns of keys that a file lacks, which is all of a
    diffusers-layout file's, and leaves the memory as it found it.
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
    """The tensors on the CPU, in one copy for each device."""
    moved: dict[str, Tensor] = {}
    for device in {tensor.device for tensor in samples.values()}:
        here = {key: tensor for key, tensor in samples.items() if tensor.device == device}
        numbers = torch.cat(list(here.values())).cpu().split([len(tensor) for tensor in here.values()])
        moved |= zip(here, numbers, strict=True)
    return {key: moved[key] for key in samples}
