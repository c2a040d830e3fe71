"""A convolution over three frames with half or two thirds of the multiplications: Winograd's F(m, 3).

A causal convolution makes m frames y of m + 2 input frames d (oldest first) and three taps g. Each tap is a 3x3
convolution, so that is 3 m convolutions:

    y[k] = d[k] g[0] + d[k + 1] g[1] + d[k + 2] g[2]

Winograd's algorithm makes the same frames with m + 2 convolutions (S. Winograd, Arithmetic Complexity of Computations,
1980; A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308):

    y = A p,   p[i] = (B d)[i] (G g)[i]

**The key insight:** y and g are the coefficients of polynomials of degree m - 1 and 2. Their product has degree m + 1,
so its values at m + 2 points determine it, and at one point a product of polynomials is one product of values. The
convolution is the transpose of that multiplication. The points are m + 1 numbers x and infinity. The rows of G are 1,
x, x^2. The columns of A are the powers of x up to m - 1. The row and the column of infinity select the highest power. B
is the inverse of the transposed matrix of powers up to m + 1.

The taps are transformed once, when weights are loaded. The pass that writes what a convolution reads forms the sums of
frames, B d. The pass that reads what it gives forms the sums of products, A p (see `kernels`).

m is 2 or 4 (`POINTS`). For 4 there are two points near 1 that are each other's reciprocals, and their negatives. Of all
small fractions these have the least expected rounding error. How the error depends on the points is shown in B.
Barabasz et al., Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks,
arXiv:1803.10986. Which m a level uses is decided in `frames_per_group` of the decoder's weights.

The first frame of a video has only copies of itself before it. Its convolution is one with the sum of the taps. It is
in no group; groups of m frames follow it.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .convolution import conv2d

POINTS = {2: (1.0,), 4: (2 / 3, 3 / 2)}
"""For each m the points beside 0 and infinity; their negatives belong to them."""

TOTAL = {2: 1, 4: 6}
"""Index of the sum of the taps among the transformed taps. With a point at 1 it is one of them, else it is appended."""

Matrix = tuple[tuple[float, ...], ...]


@cache
def matrices(m: int) -> tuple[Matrix, Matrix, Matrix]:
    """A [m, m + 2], B [m + 2, m + 2] and G [m + 2, 3] of F(m, 3)."""
    points = torch.tensor([0, *(sign * x for x in POINTS[m] for sign in (1, -1))], dtype=torch.float64)

    def powers(count: int) -> Tensor:
        infinity = torch.eye(count, dtype=torch.float64)[-1:]
        return torch.cat([points[:, None] ** torch.arange(count), infinity])

    three = powers(m).T, powers(m + 2).inverse().T.round(decimals=12), powers(3)
    return tuple(tuple(map(tuple, matrix.tolist())) for matrix in three)


class Products(NamedTuple):
    """What a convolution gave, before the last sums and without its bias."""

    transformed: tuple[Tensor, ...]
    """p: m + 2 times [groups, H, W, out]."""
    first_frame: Tensor | None
    """[1, H, W, out], the video's first frame, if it is among these."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the frames, [n, H, W, out]."""
        groups, *rest = self.transformed[0].shape
        return (self.first_frame is not None) + (len(self.transformed) - 2) * groups, *rest


def _combined(row: tuple[float, ...], tensors: tuple[Tensor, ...]) -> Tensor:
    """The sum of the tensors times the numbers of a row, in float32 at least."""
    total = torch.zeros_like(tensors[0], dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    for factor, tensor in zip(row, tensors, strict=True):
        if factor:
            total.add_(tensor, alpha=factor)
    return total


def transform_taps(weight: Tensor, dtype: torch.dtype, m: int) -> Tensor:
    """[out, in, 3, 3, 3] -> [m + 2 or m + 3, out, in, 3, 3], each channels-last and rounded once (see `TOTAL`)."""
    rows = matrices(m)[2]
    if TOTAL[m] == len(rows):
        rows = *rows, (1.0, 1.0, 1.0)
    taps = weight.new_empty(len(rows), weight.shape[0], *weight.shape[3:], weight.shape[1], dtype=dtype)
    taps = taps.permute(0, 1, 4, 2, 3)
    for tap, row in zip(taps, rows, strict=True):
        tap.copy_(_combined(row, weight.unbind(2)))
    return taps


def transform_frames(past: Tensor, frames: Tensor, out: Tensor) -> None:
    """past [2, H, W, C] and the frames after it, [m * groups, H, W, C], into out, [m + 2, groups, H, W, C]."""
    m = len(out) - 2
    before = torch.cat([past, frames])
    d = tuple(before[i : i + len(frames) : m] for i in range(m + 2))
    for target, row in zip(out, matrices(m)[1], strict=True):
        target.copy_(_combined(row, d))


def convolve(window: Tensor, first_frame: int, taps: Tensor) -> Products:
    """A window (see `kernels.fill_groups`) and taps, [>= m + 2, out, C, 3, 3] -> products.

    first_frame: 1 if the window begins with the video's first frame, else 0.
    """
    m = len(window) - 2
    first = _convolve(window[0, :1], taps[TOTAL[m]]) if first_frame else None
    return Products(
        tuple(_convolve(frames[first_frame:], tap) for frames, tap in zip(window, taps, strict=False)), first
    )


def _convolve(frames: Tensor, tap: Tensor) -> Tensor:
    return conv2d(frames.permute(0, 3, 1, 2), tap).permute(0, 2, 3, 1).contiguous()


def sum_products(products: Products) -> Tensor:
    """The frames, [n, H, W, out], float32."""
    transformed, first_frame = products
    first, m = int(first_frame is not None), len(transformed) - 2
    frames = transformed[0].new_zeros(products.shape, dtype=torch.float32)
    if first_frame is not None:
        frames[:1] = first_frame
    for k, row in enumerate(matrices(m)[0]):
        for factor, tensor in zip(row, transformed, strict=True):
            if factor:
                frames[first + k :: m].add_(tensor, alpha=factor)
    return frames
