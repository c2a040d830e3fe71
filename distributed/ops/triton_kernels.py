"""Triton forms of the functions in `kernels`, which defines their results. Each is one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .winograd import POINTS, Products

SIZES = [
    "frames", "height", "width", "x_frame", "x_row", "out_height", "out_width", "out_frame", "out_row", "top", "left",
    "first_chunk",
]  # fmt: skip
JIT = triton.jit(do_not_specialize=SIZES)
"""Sizes differ between decodes, and recompiling a kernel for new sizes would take seconds.

x_frame, x_row, out_frame, out_row: strides between frames and rows, in pixels.
"""


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


NEAR, FAR = (tl.constexpr(point) for point in POINTS[4])
NEAR_2, FAR_2 = (tl.constexpr(point**2) for point in POINTS[4])


@triton.jit
def _two(value, p0_ptr, p1_ptr, p2_ptr, p3_ptr, at, inside):
    """Return value + products for two frames."""
    p1 = _load(p1_ptr, at, inside)
    p2 = _load(p2_ptr, at, inside)
    return value + _load(p0_ptr, at, inside) + p1 + p2, value + p1 - p2 + _load(p3_ptr, at, inside)


@triton.jit
def _four(value, p0_ptr, p1_ptr, p2_ptr, p3_ptr, p4_ptr, p5_ptr, at, inside):
    """Return value + products for four frames."""
    p1 = _load(p1_ptr, at, inside)
    p2 = _load(p2_ptr, at, inside)
    p3 = _load(p3_ptr, at, inside)
    p4 = _load(p4_ptr, at, inside)
    near, far = p1 + p2, p3 + p4
    first = value + _load(p0_ptr, at, inside) + near + far
    third = value + near * NEAR_2 + far * FAR_2
    near, far = (p1 - p2) * NEAR, (p3 - p4) * FAR
    second = value + near + far
    fourth = value + near * NEAR_2 + far * FAR_2 + _load(p5_ptr, at, inside)
    return first, second, third, fourth


@triton.jit
def _activate(value, gamma, NORM: tl.constexpr):
    if NORM:
        norm = tl.sqrt(tl.sum(value * value, axis=1))
        value = value * (1 / tl.maximum(norm, 1e-12))[:, None] * gamma
        value = value * tl.sigmoid(value)
    return value


@JIT
def _repeat_border(
    window_ptr, height, width, top, left, out_height, out_width,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Index places along the rows above and below the frames first, then along the columns on both sides."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_C)[None, :]
    along = (out_height - height) * out_width
    beside = place - along
    columns = tl.maximum(out_width - width, 1)
    row = tl.where(place < along, place // out_width, top + beside // columns)
    row += tl.where((place < along) & (row >= top), height, 0)
    column = tl.where(place < along, place % out_width, beside % columns)
    column += tl.where((place >= along) & (column >= left), width, 0)
    nearest_row = tl.minimum(tl.maximum(row, top), top + height - 1)
    nearest_column = tl.minimum(tl.maximum(column, left), left + width - 1)
    inside = (place < along + height * (out_width - width))[:, None] & (channel < C)
    frame = tl.program_id(1).to(tl.int64) * out_height
    source = ((frame + nearest_row) * out_width + nearest_column)[:, None] * C + channel
    target = ((frame + row) * out_width + column)[:, None] * C + channel
    tl.store(window_ptr + target, tl.load(window_ptr + source, mask=inside), mask=inside)


def repeat_border(window: Tensor, corner: tuple[int, int], height: int, width: int) -> None:
    """Fill the pixels around frames of height x width pixels at `corner` in window, [n, H', W', C], in place."""
    n, out_height, out_width, channels = window.shape
    block_c = triton.next_power_of_2(channels)
    block = max(1, 2048 // block_c)
    places = out_height * out_width - height * width
    if places:
        grid = triton.cdiv(places, block), n
        _repeat_border[grid](window, height, width, *corner, out_height, out_width, channels, block_c, block)


@triton.jit
def _rounded(value, out_ptr):
    return value.to(out_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _store(pointer, at, value, inside):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


@JIT
def _fill(
    x_ptr, p0_ptr, p1_ptr, p2_ptr, p3_ptr, p4_ptr, p5_ptr, first_frame_ptr, bias_ptr, gamma_ptr, past_ptr, out_ptr,
    frames, height, width, x_frame, x_row, out_height, out_width, top, left, first_chunk,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr,
    X: tl.constexpr, PRODUCTS: tl.constexpr, NORM: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    """Compute `fill_groups` with TRANSFORM, otherwise `fill_window`. A program loops over all frames of its pixels."""
    SUM: tl.constexpr = X and PRODUCTS and TRANSFORM
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_C)[None, :]
    inside = (pixel < height * width)[:, None] & (channel < C)
    row = pixel // width
    column = pixel % width
    at = pixel[:, None] * C + channel
    x_at = (row * x_row + column)[:, None] * C + channel
    place = ((row + top) * out_width + column + left)[:, None] * C + channel
    plane = (height * width).to(tl.int64) * C
    x_plane = x_frame.to(tl.int64) * C
    framed = out_height.to(tl.int64) * out_width * C
    first_frame = frames % M
    groups = frames // M
    slots = (groups + first_frame) * framed
    bias = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    if PRODUCTS:
        bias += _load(bias_ptr, channel, channel < C)
    gamma = bias
    if NORM:
        gamma = _load(gamma_ptr, channel, channel < C) * C**0.5
    d0 = bias
    d1 = bias
    if first_frame == 1:
        value = bias
        if PRODUCTS:
            value += _load(first_frame_ptr, at, inside)
        if X:
            value += _load(x_ptr, x_at, inside)
            if SUM:
                _store(x_ptr, x_at, value, inside)
        d0 = _rounded(_activate(value, gamma, NORM), out_ptr)
        d1 = d0
        _store(out_ptr, place, d0, inside)
    elif TRANSFORM:
        if first_chunk:
            value = bias
            if PRODUCTS:
                value += _load(p0_ptr, at, inside) + _load(p1_ptr, at, inside) + _load(p2_ptr, at, inside)
                if M == 4:
                    value += _load(p3_ptr, at, inside) + _load(p4_ptr, at, inside)
            if X:
                value += _load(x_ptr, x_at, inside)
            d0 = _rounded(_activate(value, gamma, NORM), out_ptr)
            d1 = d0
        else:
            d0 = _load(past_ptr, at, inside)
            d1 = _load(past_ptr + plane, at, inside)
    x_ptr += first_frame * x_plane
    out_ptr += first_frame * framed
    for group in range(0, groups):
        first = bias
        second = bias
        third = bias
        fourth = bias
        if PRODUCTS:
            where = at + group * plane
            if M == 2:
                first, second = _two(bias, p0_ptr, p1_ptr, p2_ptr, p3_ptr, where, inside)
            else:
                first, second, third, fourth = _four(
                    bias, p0_ptr, p1_ptr, p2_ptr, p3_ptr, p4_ptr, p5_ptr, where, inside
                )  # fmt: skip
        if X:
            here = x_ptr + group * M * x_plane
            first += _load(here, x_at, inside)
            second += _load(here + x_plane, x_at, inside)
            if M == 4:
                third += _load(here + 2 * x_plane, x_at, inside)
                fourth += _load(here + 3 * x_plane, x_at, inside)
            if SUM:
                _store(here, x_at, first, inside)
                _store(here + x_plane, x_at, second, inside)
                if M == 4:
                    _store(here + 2 * x_plane, x_at, third, inside)
                    _store(here + 3 * x_plane, x_at, fourth, inside)
        d2 = _rounded(_activate(first, gamma, NORM), out_ptr)
        d3 = _rounded(_activate(second, gamma, NORM), out_ptr)
        d4 = d2
        d5 = d3
        if M == 4:
            d4 = _rounded(_activate(third, gamma, NORM), out_ptr)
            d5 = _rounded(_activate(fourth, gamma, NORM), out_ptr)
        if TRANSFORM:
            base = out_ptr + group * framed
            if M == 2:
                _store(base, place, d0 - d2, inside)
                _store(base + slots, place, (d2 + d1) * 0.5, inside)
                _store(base + 2 * slots, place, (d2 - d1) * 0.5, inside)
                _store(base + 3 * slots, place, d3 - d1, inside)
            else:
                _store(base, place, d0 - d2 * (NEAR_2 + FAR_2) + d4, inside)
                even = (d4 - d2 * FAR_2) * (0.5 / (NEAR_2 - FAR_2) / NEAR_2)
                odd = (d3 - d1 * FAR_2) * (0.5 / (NEAR_2 - FAR_2) / NEAR)
                _store(base + slots, place, even + odd, inside)
                _store(base + 2 * slots, place, even - odd, inside)
                even = (d4 - d2 * NEAR_2) * (0.5 / (FAR_2 - NEAR_2) / FAR_2)
                odd = (d3 - d1 * NEAR_2) * (0.5 / (FAR_2 - NEAR_2) / FAR)
                _store(base + 3 * slots, place, even + odd, inside)
                _store(base + 4 * slots, place, even - odd, inside)
                _store(base + 5 * slots, place, d1 - d3 * (NEAR_2 + FAR_2) + d5, inside)
        else:
            base = out_ptr + group * M * framed
            _store(base, place, d2, inside)
            _store(base + framed, place, d3, inside)
            if M == 4:
                _store(base + 2 * framed, place, d4, inside)
                _store(base + 3 * framed, place, d5, inside)
        d0 = d4
        d1 = d5
    if TRANSFORM:
        _store(past_ptr, at, d0, inside)
        _store(past_ptr + plane, at, d1, inside)


def fill(
    x: Tensor | None,
    products: Products | None,
    past: Tensor | None,
    out: Tensor,
    corner: tuple[int, int],
    first_chunk: bool,
    bias: Tensor | None,
    gamma: Tensor | None,
) -> None:
    """Compute `kernels.fill_groups` if past is given, otherwise `kernels.fill_window`."""
    n, height, width, channels = (products if x is None else x).shape
    m = len(products.transformed if past is None else out) - 2
    block_c = triton.next_power_of_2(channels)
    block = max(1, 512 // block_c)
    x_ptr, bias_ptr, gamma_ptr, past_ptr = (out if given is None else given for given in (x, bias, gamma, past))
    _fill[(triton.cdiv(height * width, block),)](
        x_ptr, *_pointers(products, out), bias_ptr, gamma_ptr, past_ptr, out,
        n, height, width, *_steps(x_ptr), *out.shape[-3:-1], *corner, int(first_chunk),
        channels, block_c, block, m, x is not None, products is not None, gamma is not None, past is not None,
    )  # fmt: skip
    repeat_border(out.flatten(0, -4), corner, height, width)


def _steps(frames: Tensor) -> tuple[int, int]:
    """Return the strides between frames and between rows, in pixels."""
    return frames.stride(-4) // frames.shape[-1], frames.stride(-3) // frames.shape[-1]


def _pointers(products: Products | None, instead: Tensor) -> tuple[Tensor, ...]:
    """Return p0 to p5 and the first frame, with `instead`, which is never read, for those that are missing."""
    transformed, first_frame = products or ((), None)
    return *transformed, *(instead,) * (6 - len(transformed)), instead if first_frame is None else first_frame


@JIT
def _upsample(
    p0_ptr, p1_ptr, p2_ptr, p3_ptr, p4_ptr, p5_ptr, first_frame_ptr, bias_ptr, x_ptr, out_ptr,
    frames, height, width, x_frame, x_row, out_height, out_width, out_frame, out_row, top, left,
    C: tl.constexpr, CIN: tl.constexpr, RATE: tl.constexpr, FIRST: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    shift: tl.constexpr = 1 if FIRST else 0
    # The frames of one place are adjacent programs, because those of a group read the same products.
    out_frames = frames * RATE - shift
    frame = tl.program_id(0) % out_frames
    pixel = (tl.program_id(0) // out_frames) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_C)[None, :]
    out_at = (pixel // out_width) * out_row + pixel % out_width
    column = pixel % out_width + left
    row = pixel // out_width + top
    # With FIRST the first input frame becomes one output frame, so all later frames are shifted by one.
    moved = frame + shift
    source = moved // RATE
    first = (frame == 0) & (shift == 1)
    phase = tl.where(first, 0, moved % RATE)
    corner = (row % 2) * 2 + column % 2
    position = (row // 2) * width + column // 2
    inside = (pixel < out_height * out_width)[:, None] & (channel < C)
    TOTAL: tl.constexpr = RATE * 4 * C
    repeats: tl.constexpr = TOTAL // CIN
    index = ((phase * 4 + corner) * C)[:, None] + channel
    short = index // repeats
    if FIRST:
        index = tl.where(first, (corner * 2 * C)[:, None] + channel, index)
        short = tl.where(first, (corner * (CIN // 4))[:, None] + channel // (repeats // 2), short)
    value = _load(bias_ptr, index, inside)
    x_position = source.to(tl.int64) * x_frame + (row // 2) * x_row + column // 2
    value += _load(x_ptr, x_position[:, None] * CIN + short, inside)
    at = position.to(tl.int64)[:, None] * TOTAL + index
    first_frame = frames % M
    if source < first_frame:
        value += _load(first_frame_ptr, at, inside)
    else:
        k = (source - first_frame) % M
        at += ((source - first_frame) // M) * (height * width).to(tl.int64) * TOTAL
        sign = 1 - 2 * (k % 2)
        near = _load(p1_ptr, at, inside) + sign * _load(p2_ptr, at, inside)
        if M == 2:
            value += near
        else:
            far = _load(p3_ptr, at, inside) + sign * _load(p4_ptr, at, inside)
            value += near * tl.where(k < 2, 1.0, NEAR_2) * tl.where(k % 2 == 0, 1.0, NEAR)
            value += far * tl.where(k < 2, 1.0, FAR_2) * tl.where(k % 2 == 0, 1.0, FAR)
        if k == 0:
            value += _load(p0_ptr, at, inside)
        elif k == M - 1:
            value += _load(p3_ptr if M == 2 else p5_ptr, at, inside)
    target = (frame.to(tl.int64) * out_frame + out_at)[:, None] * C + channel
    _store(out_ptr, target, value, inside)


def upsample(
    packed: Products, bias: Tensor, x: Tensor, out: Tensor, corner: tuple[int, int], temporal: bool, first: bool
) -> None:
    n, height, width, _ = packed.shape
    frames, out_height, out_width, channels = out.shape
    block_c = triton.next_power_of_2(channels)
    block = max(1, 2048 // block_c)
    _upsample[(frames * triton.cdiv(out_height * out_width, block),)](
        *_pointers(packed, x), bias, x, out,
        n, height, width, *_steps(x), out_height, out_width, *_steps(out), *corner,
        channels, x.shape[-1], 2 if temporal else 1, temporal and first, block_c, block, len(packed.transformed) - 2,
    )  # fmt: skip


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
