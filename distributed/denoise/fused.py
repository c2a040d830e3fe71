"""The element-wise operations of a block, fused into single passes over memory on devices that support it.

Two Triton kernels replace several PyTorch passes each: `add_norm` computes the gated addition at the end of one half of
a block and the norm at the start of the next, and `place_heads` norms and rotates queries and keys and writes them to
the buffer that is sent or attended to. The plain forms here are their references. On an H100 these kernels, and GELU
fused into the matrix product, are as fast as `torch.compile` of the whole block, which takes 29 s before the first step
(0.32 and 0.33 s per forward at 480x848x33, 2026-11-25).
"""

import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ranks.devices import Device

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of the rotary embedding, [tokens, dim / 2] each, float32."""


@cache
def _triton():
    """Return the Triton kernels, or None if Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton_kernels

    return triton_kernels


def _kernels(x: Tensor):
    return _triton() if Device(x.device).has_fused_kernels else None


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return layer_norm(x) * scale + shift. x: [tokens, D]; scale, shift: [D]."""
    return F.layer_norm(x, scale.shape, scale, shift, eps)


def add_norm(x: Tensor, gate: Tensor, update: Tensor, shift: Tensor, scale: Tensor, eps: float, out: Tensor) -> None:
    """Add gate * update to x, in place, and write its `modulated_norm` to out.

    x, update, out: [rows, D]; gate, shift, scale: [D].
    """
    if kernels := _kernels(x):
        return kernels.add_norm(x, gate, update, shift, scale, eps, out)
    x.addcmul_(gate, update)
    out.copy_(modulated_norm(x, shift, scale, eps))


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """Return GELU (tanh form) of a linear layer. On CUDA it is fused into the matrix product."""
    if Device(x.device).has_fused_kernels:
        return torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=True)
    return F.gelu(layer(x), approximate="tanh")


def place_heads(
    x: Tensor, out: Tensor, *, weight: Tensor | None, eps: float, rotation: Rotation | None, ranks: int
) -> None:
    """Norm each head of x, rotate it, and write it to `out`, ordered by the rank that receives the head.

    x: [tokens, heads, dim], with any stride between tokens. weight: [dim] of the RMS norm; None: no norm. rotation:
    None: no rotation. out: contiguous, with the size of x; for each rank [tokens, its heads, dim], where
    `parallel.parts` divides the heads. With one rank out may be x itself.
    """
    if not x.numel():
        return
    if kernels := _kernels(x):
        return kernels.place_heads(x, out, weight, eps, rotation, ranks)
    if weight is not None:
        x = F.rms_norm(x, weight.shape, weight, eps)
    if rotation is not None:
        x = rotate(x, rotation)
    if ranks == 1:
        out.view(x.shape).copy_(x)
    else:
        torch.cat([part.flatten() for part in x.tensor_split(ranks, dim=1)], out=out.view(-1))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate pairs of adjacent channels of x, [tokens, heads, dim]."""
    cos, sin = (part[:, None] for part in rotation)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
