"""Triton forms of functions in `fused`, which defines their results. Each is one pass over memory."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["tokens", "x_row"])
def _place_heads(
    x_ptr, out_ptr, weight_ptr, cos_ptr, sin_ptr, tokens, x_row, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, RANKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """A program processes one token. It reads all heads before it writes any, so out may be x."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < HEADS) & (channel < DIM)
    value = tl.load(x_ptr + token * x_row + head * DIM + channel, mask=inside, other=0.0)
    if NORM:
        value = value.to(tl.float32)
        mean = tl.sum(value * value, axis=1) / DIM
        weight = tl.load(weight_ptr + channel, mask=channel < DIM, other=0.0).to(tl.float32)
        value = value * tl.rsqrt(mean + eps)[:, None] * weight
    if ROTATE:
        pair = tl.arange(0, BLOCK_D // 2)[None, :]
        cos = tl.load(cos_ptr + token * (DIM // 2) + pair, mask=pair < DIM // 2, other=0.0)
        sin = tl.load(sin_ptr + token * (DIM // 2) + pair, mask=pair < DIM // 2, other=0.0)
        even, odd = tl.split(tl.reshape(value.to(tl.float32), (BLOCK_H, BLOCK_D // 2, 2)))
        turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        value = tl.reshape(turned, (BLOCK_H, BLOCK_D))
    # The first ranks have one more head than the others.
    FEWER: tl.constexpr = HEADS // RANKS
    LONGER: tl.constexpr = HEADS % RANKS
    LATER: tl.constexpr = LONGER * (FEWER + 1)
    divisor = tl.where(head < LATER, FEWER + 1, max(FEWER, 1))
    first = tl.where(head < LATER, 0, LATER)
    within = (head - first) % divisor
    start = (head - within).to(tl.int64)
    place = tokens * start * DIM + token * divisor * DIM + within * DIM + channel
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)


def place_heads(
    x: Tensor, out: Tensor, weight: Tensor | None, eps: float, rotation: tuple[Tensor, Tensor] | None, ranks: int
) -> None:
    tokens, heads, dim = x.shape
    cos, sin = rotation or (None, None)
    _place_heads[(tokens,)](
        x, out, weight, cos, sin, tokens, x.stride(0), eps,
        heads, dim, ranks, triton.next_power_of_2(heads), triton.next_power_of_2(dim),
        weight is not None, rotation is not None,
    )  # fmt: skip


@triton.jit
def _add_norm(
    x_ptr, gate_ptr, update_ptr, scale_ptr, shift_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program processes one row."""
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + channel
    gate = tl.load(gate_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + gate * update
    rounded = value.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + at, rounded, mask=inside)
    value = rounded.to(tl.float32)  # the norm uses the stored, rounded values
    centred = tl.where(inside, value - tl.sum(value, axis=0) / WIDTH, 0.0)
    variance = tl.sum(centred * centred, axis=0) / WIDTH
    normed = centred * tl.rsqrt(variance + eps) * scale + shift
    tl.store(out_ptr + at, normed.to(out_ptr.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, gate: Tensor, update: Tensor, shift: Tensor, scale: Tensor, eps: float, out: Tensor) -> None:
    rows, width = x.shape
    if rows:
        _add_norm[(rows,)](x, gate, update, scale, shift, out, eps, width, triton.next_power_of_2(width))
