"""One-pass Triton forms of the functions in `kernels`, which defines what each computes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .winograd import Products

JIT = triton.jit(do_not_specialize=["frames", "height", "width", "fresh"])
"""Sizes differ from decode to decode; a kernel compiled anew for each kind of them would cost seconds."""


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _pair(
    pair, alone, p0_ptr, p1_ptr, p2_ptr, p3_ptr, x_ptr, bias, at, plane, inside,
    X: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Both frames of a pair: x + products + bias."""
    early = 2 * pair - alone
    paired = inside & (early >= 0)
    first = bias
    second = bias
    if PRODUCTS:
        skip = pair * plane
        p1 = _load(p1_ptr + skip, at, inside)
        p2 = _load(p2_ptr + skip, at, inside)
        first += _load(p0_ptr + skip - alone * plane, at, paired) + p1 + p2
        second += p1 - p2 - _load(p3_ptr + skip, at, inside)
    if X:
        first += _load(x_ptr + early * plane, at, paired)
        second += _load(x_ptr + early * plane + plane, at, inside)
    return first, second


@triton.jit
def _activate(value, gamma, NORM: tl.constexpr):
    if NORM:
        norm = tl.sqrt(tl.sum(value * value, axis=1))
        value = value * (1 / tl.maximum(norm, 1e-12))[:, None] * gamma
        value = value * tl.sigmoid(value)
    return value


@JIT
def _repeat_border(window_ptr, height, width, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    """height and width without the border. Places go along the upper and lower row, then along both columns."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_C)[None, :]
    along = 2 * (width + 2)
    beside = place - along
    row = tl.where(place < along, (place // (width + 2)) * (height + 1), beside // 2 + 1)
    column = tl.where(place < along, place % (width + 2), (beside % 2) * (width + 1))
    nearest_row = tl.minimum(tl.maximum(row, 1), height)
    nearest_column = tl.minimum(tl.maximum(column, 1), width)
    inside = (place < along + 2 * height)[:, None] & (channel < C)
    frame = tl.program_id(1).to(tl.int64) * (height + 2)
    source = ((frame + nearest_row) * (width + 2) + nearest_column)[:, None] * C + channel
    target = ((frame + row) * (width + 2) + column)[:, None] * C + channel
    tl.store(window_ptr + target, tl.load(window_ptr + source, mask=inside), mask=inside)


def repeat_border(window: Tensor) -> None:
    n, height, width, channels = window.shape
    block_c = triton.next_power_of_2(channels)
    block = max(1, 2048 // block_c)
    grid = triton.cdiv(2 * (width + height - 2), block), n
    _repeat_border[grid](window, height - 2, width - 2, channels, block_c, block)


@JIT
def _fill(
    x_ptr, p0_ptr, p1_ptr, p2_ptr, p3_ptr, bias_ptr, gamma_ptr, past_ptr, out_ptr, frames, height, width, fresh,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
    X: tl.constexpr, PRODUCTS: tl.constexpr, NORM: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """`fill_pairs` with PAIRS, else `fill_window`. A program goes through all frames of some pixels."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_C)[None, :]
    inside = (pixel < height * width)[:, None] & (channel < C)
    at = pixel[:, None] * C + channel
    place = ((pixel // width + 1) * (width + 2) + pixel % width + 1)[:, None] * C + channel
    plane = (height * width).to(tl.int64) * C
    framed = (height + 2).to(tl.int64) * (width + 2) * C
    alone = frames % 2
    pairs = (frames + 1) // 2
    bias = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    if PRODUCTS:
        bias += _load(bias_ptr, channel, channel < C)
    gamma = bias
    if NORM:
        gamma = _load(gamma_ptr, channel, channel < C) * C**0.5
    before = bias
    last = bias
    if PAIRS:
        if fresh:
            first, second = _pair(
                0, alone, p0_ptr, p1_ptr, p2_ptr, p3_ptr, x_ptr, bias, at, plane, inside, X, PRODUCTS
            )  # fmt: skip
            last = _activate(tl.where(alone == 1, second, first), gamma, NORM)
            last = last.to(out_ptr.dtype.element_ty).to(tl.float32)
            before = last
        else:
            before = _load(past_ptr, at, inside)
            last = _load(past_ptr + plane, at, inside)
    for pair in range(0, pairs):
        first, second = _pair(
            pair, alone, p0_ptr, p1_ptr, p2_ptr, p3_ptr, x_ptr, bias, at, plane, inside, X, PRODUCTS
        )  # fmt: skip
        early = 2 * pair - alone
        paired = inside & (early >= 0)
        if PAIRS and X and PRODUCTS:
            tl.store(x_ptr + early * plane + at, first.to(x_ptr.dtype.element_ty), mask=paired)
            tl.store(x_ptr + early * plane + plane + at, second.to(x_ptr.dtype.element_ty), mask=inside)
        first = _activate(first, gamma, NORM)
        second = _activate(second, gamma, NORM)
        if PAIRS:
            d1 = tl.where(early < 0, before, last)
            d2 = tl.where(early < 0, last, first.to(out_ptr.dtype.element_ty).to(tl.float32))
            d3 = second.to(out_ptr.dtype.element_ty).to(tl.float32)
            part = out_ptr + pair * framed
            tl.store(part + place, (before - d2).to(out_ptr.dtype.element_ty), mask=paired)
            tl.store(part + pairs * framed + place, (d1 + d2).to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(part + 2 * pairs * framed + place, (d2 - d1).to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(part + 3 * pairs * framed + place, (d1 - d3).to(out_ptr.dtype.element_ty), mask=inside)
            before = d2
            last = d3
        else:
            part = out_ptr + early * framed
            tl.store(part + place, first.to(out_ptr.dtype.element_ty), mask=paired)
            tl.store(part + framed + place, second.to(out_ptr.dtype.element_ty), mask=inside)
    if PAIRS:
        tl.store(past_ptr + at, before.to(past_ptr.dtype.element_ty), mask=inside)
        tl.store(past_ptr + plane + at, last.to(past_ptr.dtype.element_ty), mask=inside)


def fill(
    x: Tensor | None,
    products: Products | None,
    past: Tensor | None,
    out: Tensor,
    fresh: bool,
    bias: Tensor | None,
    gamma: Tensor | None,
) -> None:
    """`fill_pairs` where there is a past, else `fill_window`."""
    n, height, width, channels = (products if x is None else x).shape
    block_c = triton.next_power_of_2(channels)
    block = max(1, 1024 // block_c)
    x_ptr, bias_ptr, gamma_ptr, past_ptr = (out if given is None else given for given in (x, bias, gamma, past))
    _fill[(triton.cdiv(height * width, block),)](
        x_ptr, *(products or (out,) * 4), bias_ptr, gamma_ptr, past_ptr, out, n, height, width, int(fresh),
        channels, block_c, block, x is not None, products is not None, gamma is not None, past is not None,
    )  # fmt: skip
    repeat_border(out.flatten(0, -4))


@JIT
def _upsample(
    p0_ptr, p1_ptr, p2_ptr, p3_ptr, bias_ptr, x_ptr, out_ptr, frames, height, width,
    C: tl.constexpr, CIN: tl.constexpr, RATE: tl.constexpr, FIRST: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    shift: tl.constexpr = 1 if FIRST else 0
    # Frames of one place run side by side, because those of a pair read the same products.
    out_frames = frames * RATE - shift
    frame = tl.program_id(0) % out_frames
    pixel = (tl.program_id(0) // out_frames) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_C)[None, :]
    column = pixel % (2 * width)
    row = pixel // (2 * width)
    # With FIRST the first input frame gives one output frame: everything after it is shifted by one.
    moved = frame + shift
    source = moved // RATE
    first = (frame == 0) & (shift == 1)
    phase = tl.where(first, 0, moved % RATE)
    corner = (row % 2) * 2 + column % 2
    position = (row // 2) * width + column // 2
    inside = (row < 2 * height)[:, None] & (channel < C)
    TOTAL: tl.constexpr = RATE * 4 * C
    repeats: tl.constexpr = TOTAL // CIN
    index = ((phase * 4 + corner) * C)[:, None] + channel
    short = index // repeats
    if FIRST:
        index = tl.where(first, (corner * 2 * C)[:, None] + channel, index)
        short = tl.where(first, (corner * (CIN // 4))[:, None] + channel // (repeats // 2), short)
    alone = frames % 2
    pair = (source + alone) // 2
    late = (source + alone) % 2
    plane = (height * width).to(tl.int64) * TOTAL
    at = position.to(tl.int64)[:, None] * TOTAL + index + pair * plane
    p1 = _load(p1_ptr, at, inside)
    p2 = _load(p2_ptr, at, inside)
    # One of these two is masked off.
    value = _load(p0_ptr, at - alone * plane, inside & (late == 0)) - _load(p3_ptr, at, inside & (late == 1))
    value += p1 + tl.where(late == 1, -p2, p2)
    value += _load(bias_ptr, index, inside)
    value += _load(x_ptr, (source.to(tl.int64) * height * width + position)[:, None] * CIN + short, inside)
    target = (frame.to(tl.int64) * 4 * height * width + pixel)[:, None] * C + channel
    tl.store(out_ptr + target, value.to(out_ptr.dtype.element_ty), mask=inside)


def upsample(packed: Products, bias: Tensor, x: Tensor, temporal: bool, first: bool) -> Tensor:
    n, height, width, total = packed.shape
    rate = 2 if temporal else 1
    channels = total // (4 * rate)
    first = temporal and first
    frames = n * rate - first
    out = torch.empty(frames, 2 * height, 2 * width, channels, dtype=x.dtype, device=x.device)
    block_c = triton.next_power_of_2(channels)
    block = max(1, 2048 // block_c)
    _upsample[(frames * triton.cdiv(4 * height * width, block),)](
        *packed, bias, x, out, n, height, width, channels, x.shape[-1], rate, first, block_c, block
    )
    return out


@JIT
def _sum_taps(partial_ptr, bias_ptr, out_ptr, height, width, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    frame = tl.program_id(2) // 3
    time = tl.program_id(2) % 3
    inside = column < width
    # The constant is added once, with the newest of the three frames: the bias, and 1 to move -1..1 to 0..1.
    newest = (time == 2).to(tl.float32)
    red = tl.zeros((BLOCK,), tl.float32) + (tl.load(bias_ptr) + 1) * newest
    green = tl.zeros((BLOCK,), tl.float32) + (tl.load(bias_ptr + 1) + 1) * newest
    blue = tl.zeros((BLOCK,), tl.float32) + (tl.load(bias_ptr + 2) + 1) * newest
    for y in tl.static_range(3):
        for x in tl.static_range(3):
            place = (frame.to(tl.int64) * (height + 2) + row + y) * (width + 2) + column + x
            tap = partial_ptr + place * STRIDE + time * 27 + (y * 3 + x) * 3
            red += _load(tap, 0, inside)
            green += _load(tap, 1, inside)
            blue += _load(tap, 2, inside)
    target = out_ptr + ((tl.program_id(2).to(tl.int64) * height + row) * width + column) * 3
    tl.store(target, red * 0.5, mask=inside)
    tl.store(target + 1, green * 0.5, mask=inside)
    tl.store(target + 2, blue * 0.5, mask=inside)


def sum_taps(partial: Tensor, bias: Tensor) -> Tensor:
    n, height, width = partial.shape[0], partial.shape[1] - 2, partial.shape[2] - 2
    out = torch.empty(n, 3, height, width, 3, dtype=torch.float32, device=partial.device)
    grid = (triton.cdiv(width, 128), height, 3 * n)
    _sum_taps[grid](partial, bias, out, height, width, partial.shape[-1], 128)
    return out
