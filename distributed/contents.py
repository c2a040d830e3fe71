"""Tensors as they travel to ranks, and the digest by which ranks know what they already have."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .ranks.buffers import DTYPES


def on_host(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU, contiguous, in a dtype that can be shared."""
    dtype = tensor.dtype if tensor.dtype in DTYPES.values() else torch.float32
    return tensor.detach().to("cpu", dtype).contiguous()


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return a digest of the contents of tensors on the CPU, of their names, dtypes and shapes, and of a text."""
    found = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
