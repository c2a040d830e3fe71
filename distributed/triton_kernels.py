"""One-pass Triton forms of the functions in `kernels`, which defines what each computes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

JIT = triton.jit(do_not_specialize=["pixels", "height", "width"])
"""Sizes differ from decode to decode; a kernel compiled anew for each kind of them would cost seconds."""


@JIT
def _fill_window(
    x_ptr, add_ptr, bias_ptr, gamma_ptr, out_ptr, pixels, height, width,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_C)
    inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
    source = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    value = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(add_ptr + source, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias_ptr + channel, mask=channel < C, other=0.0)[None, :]
    if ADD:
        tl.store(x_ptr + source, value.to(x_ptr.dtype.element_ty), mask=inside)
    if NORM:
        norm = tl.sqrt(tl.sum(value * value, axis=1))
        value = value / tl.maximum(norm, 1e-12)[:, None]
        value *= tl.load(gamma_ptr + channel, mask=channel < C, other=0.0)[None, :]
        value = value * tl.sigmoid(value)
    result = value.to(out_ptr.dtype.element_ty)
    column = pixel % width
    row = (pixel // width) % height
    frame = pixel // (width * height)
    place = (frame.to(tl.int64) * (height + 2) + row + 1) * (width + 2) + column + 1
    # The border repeats the nearest pixel, so pixels at the edge are stored more than once.
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            wanted = pixel < pixels
            if dy == -1:
                wanted &= row == 0
            if dy == 1:
                wanted &= row == height - 1
            if dx == -1:
                wanted &= column == 0
            if dx == 1:
                wanted &= column == width - 1
            target = (place + dy * (width + 2) + dx)[:, None] * C + channel[None, :]
            tl.store(out_ptr + target, result, mask=inside & wanted[:, None])


def fill_window(x: Tensor, out: Tensor, bias: Tensor | None, add: Tensor | None, gamma: Tensor | None) -> None:
    n, height, width, channels = x.shape
    pixels = n * height * width
    block_c = triton.next_power_of_2(channels)
    block = max(1, 4096 // block_c)
    scaled = x if gamma is None else gamma * channels**0.5
    _fill_window[(triton.cdiv(pixels, block),)](
        x, x if add is None else add, x if bias is None else bias, scaled, out, pixels, height, width,
        channels, block_c, block, add is not None, bias is not None, gamma is not None,
    )  # fmt: skip


@JIT
def _upsample(
    packed_ptr, bias_ptr, x_ptr, out_ptr, pixels, height, width,
    C: tl.constexpr, CIN: tl.constexpr, RATE: tl.constexpr, FIRST: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_C)[None, :]
    column = pixel % (2 * width)
    row = (pixel // (2 * width)) % (2 * height)
    frame = pixel // (4 * width * height)
    # With FIRST the first input frame gives one output frame: everything after it is shifted by one.
    moved = frame + 1 if FIRST else frame
    source = moved // RATE
    phase = moved % RATE
    alone = (frame == 0) if FIRST else (frame < 0)
    phase = tl.where(alone, 0, phase)
    corner = (row % 2) * 2 + column % 2
    position = (source.to(tl.int64) * height + row // 2) * width + column // 2
    inside = (pixel < pixels)[:, None] & (channel < C)
    TOTAL: tl.constexpr = RATE * 4 * C
    repeats: tl.constexpr = TOTAL // CIN
    index = ((phase * 4 + corner) * C)[:, None] + channel
    short = index // repeats
    if FIRST:
        index = tl.where(alone[:, None], (corner * 2 * C)[:, None] + channel, index)
        short = tl.where(alone[:, None], (corner * (CIN // 4))[:, None] + channel // (repeats // 2), short)
    value = tl.load(packed_ptr + position[:, None] * TOTAL + index, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias_ptr + index, mask=inside, other=0.0)
    value += tl.load(x_ptr + position[:, None] * CIN + short, mask=inside, other=0.0).to(tl.float32)
    target = pixel.to(tl.int64)[:, None] * C + channel
    tl.store(out_ptr + target, value.to(out_ptr.dtype.element_ty), mask=inside)


def upsample(packed: Tensor, bias: Tensor, x: Tensor, temporal: bool, first: bool) -> Tensor:
    n, height, width, total = packed.shape
    rate = 2 if temporal else 1
    channels = total // (4 * rate)
    first = temporal and first
    frames = n * rate - first
    out = torch.empty(frames, 2 * height, 2 * width, channels, dtype=x.dtype, device=x.device)
    pixels = frames * 4 * height * width
    block_c = triton.next_power_of_2(channels)
    block = max(1, 2048 // block_c)
    _upsample[(triton.cdiv(pixels, block),)](
        packed, bias, x, out, pixels, height, width, channels, x.shape[-1], rate, first, block_c, block
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
            red += tl.load(tap, mask=inside, other=0.0).to(tl.float32)
            green += tl.load(tap + 1, mask=inside, other=0.0).to(tl.float32)
            blue += tl.load(tap + 2, mask=inside, other=0.0).to(tl.float32)
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
