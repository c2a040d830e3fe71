"""From (latent shape, mode, ranks, memory) to who decodes what.

Everything here is a pure function of its arguments. Every rank computes the same plan from the same job, so nothing
is negotiated between them.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .decoder import LANES, Steps
from .tiling import SPATIAL, check_tile

if TYPE_CHECKING:
    from .decoder import Weights

TEMPORAL = 4
"""Frames of a latent frame, but for the first, which is one frame."""

MODES = ("seamless", "tiled")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Job:
    """The one description of a decode. JSON-able through `dataclasses.asdict`.

    latent_shape is [B, C, T, H, W] in VAE space; tile_size and overlap are pixels; dtype is what ranks compute in;
    memory is what each rank may use, weights included, in bytes (None: whatever is free).
    """

    latent_shape: tuple[int, int, int, int, int]
    mode: str = "seamless"
    tile_size: int = 256
    overlap: int = 64
    dtype: str = "float32"
    memory: int | None = None

    @property
    def frames_shape(self) -> tuple[int, int, int, int, int]:
        """Shape [B, frames, height, width, 3] of the decoded video."""
        batch, _, time, height, width = self.latent_shape
        return batch, frame_count(time), height * SPATIAL, width * SPATIAL, 3


def frame_count(time: int) -> int:
    """Frames that `time` latent frames decode to."""
    return TEMPORAL * (time - 1) + 1


def check_job(job: Job, world_size: int) -> None:
    """Refuse, with a ValueError for the person at the graph, a job that no group of this size could do."""
    if len(job.latent_shape) != 5 or min(job.latent_shape) < 1:
        raise ValueError(
            f"The latent has shape {list(job.latent_shape)}; a video latent is "
            "[batch, channels, frames, height, width] "
            "with no empty dimension. Check that it comes from a HunyuanVideo-1.5 sampler."
        )
    if job.mode not in MODES:
        raise ValueError(f"mode is {job.mode!r}; it must be one of {', '.join(MODES)}.")
    if job.dtype not in DTYPES:
        raise ValueError(f"dtype is {job.dtype!r}; it must be one of {', '.join(DTYPES)}.")
    if world_size < 1:
        raise ValueError(f"A group of {world_size} ranks cannot decode; it needs at least one.")
    if job.mode == "tiled":
        check_tile(job.tile_size, job.overlap)


def check_latent(latent: Tensor, channels: int) -> None:
    """Refuse, with a ValueError, a latent [B, C, T, H, W] that a VAE of `channels` cannot decode, or a spoiled one."""
    if latent.shape[1] != channels:
        raise ValueError(
            f"The latent has {latent.shape[1]} channels and the VAE decodes {channels}. They are not of the same model."
        )
    if not latent.is_floating_point():
        raise ValueError(f"The latent holds {latent.dtype}; it must hold floating point numbers.")
    bad = latent.numel() - int(torch.isfinite(latent).sum())
    if bad:
        raise ValueError(f"{bad} of the latent's {latent.numel()} values are not finite; the sampler went astray.")


@dataclass(frozen=True)
class Region:
    """A rectangle of latent positions: rows [top, bottom), columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left


@dataclass(frozen=True)
class Division:
    """The picture divided into rows x columns regions, one for each of the first rows * columns ranks."""

    row_cuts: tuple[int, ...]
    column_cuts: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.row_cuts) - 1

    @property
    def columns(self) -> int:
        return len(self.column_cuts) - 1

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def region(self, index: int) -> Region:
        """The region of rank `index`; regions are numbered row by row."""
        row, column = divmod(index, self.columns)
        return Region(
            self.row_cuts[row], self.row_cuts[row + 1], self.column_cuts[column], self.column_cuts[column + 1]
        )


def cuts(extent: int, parts: int) -> tuple[int, ...]:
    """Where to cut `extent` positions into `parts` runs that differ by at most one position."""
    return tuple(extent * part // parts for part in range(parts + 1))


def divide(height: int, width: int, world_size: int) -> Division:
    """Divide a latent of height x width between at most `world_size` ranks.

    Time follows the largest region, so that decides; then, since borders travel, the least length of cuts. A picture
    too small to give every rank a position leaves some ranks without one.
    """
    options = [
        (rows, columns)
        for rows in range(1, min(height, world_size) + 1)
        for columns in range(1, min(width, world_size // rows) + 1)
    ]

    def cost(option: tuple[int, int]) -> tuple[int, int, int]:
        rows, columns = option
        largest = math.ceil(height / rows) * math.ceil(width / columns)
        return largest, (rows - 1) * width + (columns - 1) * height, rows

    rows, columns = min(options, key=cost)
    return Division(cuts(height, rows), cuts(width, columns))


FULL_STEP = 12_500
"""Latent positions (frames x height x width) of a step that keeps a large GPU busy; a larger one only costs memory."""

LONGEST_STEP = 8
"""Latent frames of a step of a small picture."""

WORKSPACE = 256 * 2**20
"""What the convolution library may want beside what is counted here."""


def choose_steps(
    weights: "Weights", height: int, width: int, time: int, positions: int, together: bool, free: int
) -> tuple[Steps | None, int]:
    """The steps in which a part of height x width latent positions is decoded within `free` bytes.

    positions: latent positions that the attention sees; together: borders travel. Returns the steps, or None where
    not even the smallest fit, and the bytes that they need (see `peak_bytes`).
    """
    n = max(1, min(-(-FULL_STEP // (height * width)), LONGEST_STEP, time))
    while True:
        doubling, flat = max(0, weights.flat - 1), len(weights.blocks) - max(1, weights.flat)
        # A frame has four times the pixels a level up, so the flat levels are as busy with half the frames.
        steps = Steps(n, (n,) * doubling + (max(1, n // 2),) * flat)
        needed = peak_bytes(weights, height, width, time, positions, together, steps)
        if needed <= free:
            return steps, needed
        if n == 1:
            return None, needed
        n //= 2


def peak_bytes(
    weights: "Weights", height: int, width: int, time: int, positions: int, together: bool, steps: Steps
) -> int:
    """Bytes on the device at the fullest moment of a decode: weights, windows, keys and values, working tensors."""
    size = weights.dtype.itemsize

    def frame(level: int) -> int:
        scale = 2**level
        return (height * scale + 2) * (width * scale + 2) * weights.widths[level] * size

    total = weights.nbytes + 2 * time * positions * weights.widths[0] * size + WORKSPACE
    convs = 2 * len(weights.mid) + 2 * len(weights.blocks[0])
    total += (2 * convs + 2 + 4 * steps.trunk + 4) * frame(0)
    working = 3 * steps.trunk * frame(0)
    waiting = 0
    for level in range(1, len(weights.blocks)):
        step = steps.tail[level - 1]
        lanes = LANES if together and level >= weights.flat else 1
        convs = 2 * len(weights.blocks[level]) + (level < len(weights.upsamplers))
        total += (2 * convs + step * lanes + step + 1) * frame(level)
        # The level's stream, what a convolution gives, and one more: the packed frames that came or the pixels to be.
        working = max(working, 3 * step * lanes * frame(level))
        if level <= weights.flat:  # frames that the level before handed on and that wait their turn
            before = steps.tail[level - 2] if level > 1 else steps.trunk
            waiting += 2 * before * frame(level)
    return total + working + waiting
