"""What a clip shows, from its frames alone: colour, shape and motion. And how similar two clips are.

No network is used. Pixels whose brightest channel exceeds a threshold belong to the shape (see `world.py`). Its colour
is the nearest one of the palette, its outline the nearest one of the shapes', and its motion follows from the line that
its centre describes.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .world import COLOURS, MOTIONS, SHAPES, Clip, coverage

THRESHOLD = 0.58
"""Brightness between backgrounds (0.42 at most) and shapes (0.82 at least)."""
LEAST_AREA, MOST_AREA = 0.005, 0.25
"""Limits of the shape's part of the picture."""
LEAST_TRAVEL = 0.3
"""Distance, in square roots of the shape's area, from which on a shape counts as moving."""
SIDE = 48
"""Pixels per side of normalised outlines."""
MOST_DEVIATION = 0.25
"""Largest mean difference between a normalised outline and the nearest shape's, within the area of that shape."""


@dataclass(frozen=True)
class Seen:
    """What a clip shows. None: no such thing can be recognised."""

    shape: str | None
    colour: str | None
    motion: str | None


NOTHING = Seen(None, None, None)


def look(frames: Tensor) -> Seen:
    """Return what the frames, [frames, height, width, 3] from 0 to 1, show."""
    pixels = frames.float().clamp(0, 1).permute(0, 3, 1, 2)
    smooth = F.avg_pool2d(F.pad(pixels, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    mask = (smooth.amax(1) > THRESHOLD).float()
    areas = mask.mean((1, 2))
    clear = (areas > LEAST_AREA) & (areas < MOST_AREA)
    if clear.float().mean() < 0.75:
        return NOTHING
    mask, smooth = mask[clear], smooth[clear]
    return Seen(_shape(mask), _colour(smooth, mask), _motion(mask, clear))


def follows(frames: Tensor, shape: str, colour: str, motion: str) -> bool:
    """Return whether the frames show that shape, that colour and that motion."""
    return look(frames) == Seen(shape, colour, motion)


def psnr(one: Tensor, other: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of two clips of equal shape, 0 to 1."""
    error = (one.double() - other.double()).square().mean().clamp(min=1e-12)
    return float(-10 * error.log10())


def ssim(one: Tensor, other: Tensor) -> float:
    """Return the structural similarity of two clips [frames, height, width, 3], 0 to 1.

    Wang et al., 2004: a Gaussian window of 11 pixels with a standard deviation of 1.5, averaged over channels.
    """
    a, b = (clip.float().permute(0, 3, 1, 2).flatten(0, 1)[:, None] for clip in (one, other))
    taps = torch.exp(-((torch.arange(11, device=a.device) - 5.0) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()

    def window(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, taps[None, None, :, None]), taps[None, None, None])

    mean_a, mean_b = window(a), window(b)
    variances = window(a * a) - mean_a**2 + window(b * b) - mean_b**2
    covariance = window(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return float(ratio.mean())


def likeness(frames: Tensor, reference: Tensor) -> float:
    """Return how much the frames resemble a scene: the mean over frames of the correlation with the nearest frame.

    frames: [frames, height, width, 3]. reference: [frames, height, width, 3] of the scene. Both are compared at 24x40
    pixels. 1: the same. Unrelated pictures are near 0.
    """

    def small(clip: Tensor) -> Tensor:
        pixels = F.interpolate(clip.float().permute(0, 3, 1, 2), size=(24, 40), mode="area").flatten(1)
        centred = pixels - pixels.mean(1, keepdim=True)
        return centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-6)

    return float((small(frames) @ small(reference).T).amax(1).mean())


def _centres(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centres in x and y of masks [frames, height, width], in pixels from the first pixel's centre."""
    y, x = (torch.arange(n, device=mask.device, dtype=torch.float32) for n in mask.shape[1:])
    area = mask.sum((1, 2))
    return (mask.sum(1) * x).sum(1) / area, (mask.sum(2) * y).sum(1) / area


def _motion(mask: Tensor, clear: Tensor) -> str | None:
    time = torch.nonzero(clear)[:, 0].float()
    if len(time) < 2:
        return None
    centred = time - time.mean()
    length = len(clear) - 1
    path = torch.stack([(centres * centred).sum() / centred.square().sum() * length for centres in _centres(mask)])
    path = path / mask.sum((1, 2)).mean().sqrt()
    if path.abs().max() < LEAST_TRAVEL:
        return "still"
    main = int(path.abs().argmax())
    if path[main].abs() < 2 * path[1 - main].abs():
        return None
    return next(name for name, way in MOTIONS.items() if way[main] == path[main].sign())


def _colour(pixels: Tensor, mask: Tensor) -> str | None:
    inner = -F.max_pool2d(-mask[:, None], 5, stride=1, padding=2)[:, 0] > 0
    chosen = pixels.permute(0, 2, 3, 1)[inner]
    if len(chosen) == 0:
        return None
    median = chosen.median(0).values
    tones = torch.tensor(list(COLOURS.values()), device=pixels.device)
    distances = (tones / tones.amax(1, keepdim=True) - median / median.max()).norm(dim=1)
    return list(COLOURS)[int(distances.argmin())]


def _shape(mask: Tensor) -> str | None:
    outline = _normalised(mask).cpu()
    deviations = {name: float((outline - ideal).abs().sum() / ideal.sum()) for name, ideal in _outlines().items()}
    nearest = min(deviations, key=deviations.get)
    return nearest if deviations[nearest] < MOST_DEVIATION else None


def _normalised(mask: Tensor) -> Tensor:
    """Return the mean of the masks, moved to the centre and scaled to equal area, [SIDE, SIDE]."""
    height, width = mask.shape[1:]
    x, y = _centres(mask)
    steps = torch.linspace(-1.3, 1.3, SIDE, device=mask.device) * mask.sum((1, 2)).sqrt()[:, None]
    columns = ((x[:, None] + steps) * 2 + 1) / width - 1
    rows = ((y[:, None] + steps) * 2 + 1) / height - 1
    grid = torch.stack(
        [columns[:, None].expand(-1, SIDE, -1), rows[:, :, None].expand(-1, -1, SIDE)],
        dim=-1,
    )
    return F.grid_sample(mask[:, None], grid, align_corners=False).mean((0, 1))


@cache
def _outlines() -> dict[str, Tensor]:
    """Return the normalised outline of each shape."""
    clips = {name: Clip(name, "white", "still") for name in SHAPES}
    return {name: _normalised(coverage(clip, 1, 240, 240)) for name, clip in clips.items()}
