"""A convolution over three frames with two thirds of the multiplications: Winograd's minimal filtering F(2, 3).

Two frames of a causal convolution are made of four input frames d0 to d3 (oldest first) and three taps g0 to g2,
each of them a 3x3 convolution:

    y0 = d0 g0 + d1 g1 + d2 g2          y1 = d1 g0 + d2 g1 + d3 g2

That is six 3x3 convolutions. The same two frames come of four (S. Winograd, Arithmetic Complexity of Computations,
1980; A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308):

    p0 = (d0 - d2) g0
    p1 = (d1 + d2) (g0 + g1 + g2) / 2
    p2 = (d2 - d1) (g0 - g1 + g2) / 2
    p3 = (d1 - d3) g2
    y0 = p0 + p1 + p2                   y1 = p1 - p2 - p3

The taps are transformed once, when weights are loaded. The sums of frames are formed by the pass that writes what the
convolution reads, those of products by the pass that reads what it gives (`kernels`). In half precision the whole
decoder's error stays below diffusers' own: 0.88 times in bfloat16, at small widths (2026-11-24). F(4, 3), which would
save half of the multiplications, made it 1.26 times.

Of an odd number of frames the first stands alone: as the y1 of a pair whose y0 nobody wants.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WIDE, PIECE = 4096, 1024
"""Of more than so many channels at once, so many: cuDNN 9 is up to six times slower at 1024 -> 8192."""


class Products(NamedTuple):
    """What a convolution gave, before the last sums and without its bias: p0 to p3, [pairs, H, W, out] each.

    p0 lacks the first pair where the first frame stands alone.
    """

    p0: Tensor
    p1: Tensor
    p2: Tensor
    p3: Tensor

    @property
    def alone(self) -> int:
        """1 where the first frame stands alone, else 0."""
        return len(self.p3) - len(self.p0)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the frames, [n, H, W, out]."""
        return len(self.p0) + len(self.p3), *self.p3.shape[1:]


def transform_taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in, 3, 3, 3] -> [4, out, in, 3, 3], each of the four channels-last, rounded once."""
    g0, g1, g2 = weight.unbind(2)
    four = weight.new_empty(4, weight.shape[0], *weight.shape[3:], weight.shape[1], dtype=dtype)
    four = four.permute(0, 1, 4, 2, 3)
    ends = g0.float() + g2
    four[0], four[3] = g0, g2
    four[1] = (ends + g1) / 2
    four[2] = ends.sub_(g1).div_(2)
    return four


def transform_frames(past: Tensor, frames: Tensor, out: Tensor) -> None:
    """past [2, H, W, C] and the frames after it, [n, H, W, C], into out, [4, pairs, H, W, C], rounded once."""
    d = torch.cat([past[: len(frames) % 2], past, frames])
    d0, d1, d2, d3 = d[:-2:2], d[1:-1:2], d[2::2], d[3::2]
    torch.sub(d0, d2, out=out[0])
    torch.add(d1, d2, out=out[1])
    torch.sub(d2, d1, out=out[2])
    torch.sub(d1, d3, out=out[3])


def convolve(window: Tensor, alone: int, taps: Tensor) -> Products:
    """[4, pairs, H + 2, W + 2, C], transformed frames with a border, and taps [4, out, C, 3, 3] -> products."""
    parts = window[0, alone:], *window[1:]
    return Products(*(_convolve(part.permute(0, 3, 1, 2), tap) for part, tap in zip(parts, taps, strict=True)))


def _convolve(part: Tensor, tap: Tensor) -> Tensor:
    if len(tap) > WIDE:
        given = torch.cat([F.conv2d(part, piece) for piece in tap.split(PIECE)], 1)
    else:
        given = F.conv2d(part, tap)
    return given.permute(0, 2, 3, 1).contiguous()


def sum_products(products: Products) -> Tensor:
    """The frames, [n, H, W, out], float32."""
    p0, p1, p2, p3 = products
    alone = products.alone
    frames = p3.new_empty(products.shape, dtype=torch.float32)
    frames[alone::2].copy_(p0).add_(p1[alone:]).add_(p2[alone:])
    frames[1 - alone :: 2].copy_(p1).sub_(p2).sub_(p3)
    return frames
