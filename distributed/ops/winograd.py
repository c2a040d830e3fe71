"""A convolution over three frames with half or two thirds of the multiplications: Winograd's F(m, 3).

A causal convolution computes m frames y from m + 2 input frames d (oldest first) and three taps g. Each tap is a 3x3
convolution, so this needs 3 m convolutions:

    y[k] = d[k] g[0] + d[k + 1] g[1] + d[k + 2] g[2]

Winograd's algorithm computes them with m + 2 convolutions (S. Winograd, Arithmetic Complexity of Computations, 1980; A.
Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308):

    y = A p,   p[i] = (B d)[i] (G g)[i]

**Key idea:** y and g are the coefficients of polynomials of degree m - 1 and 2. Their product has degree m + 1, so its
values at m + 2 points determine it, and at one point a product of polynomials is one product of values. The convolution
is the transpose of that multiplication. The points are m + 1 numbers x and infinity. The rows of G are 1, x, x^2. The
columns of A are the powers of x up to m - 1. The row and the column of infinity select the highest power. B is the
inverse of the transposed matrix of powers up to m + 1.

The taps are transformed once, when weights are loaded. The pass that writes the input of a convolution computes the
sums of frames, B d. The pass that reads its output computes the sums of products, A p (see `kernels`).

m is 2 or 4 (`POINTS`). For 4 there are two points near 1, one the reciprocal of the other, and their negatives. Of all
small fractions these have the least expected rounding error. For how the error depends on the points see B. Barabasz et
al., Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks, arXiv:1803.10986.
`frames_per_group` of the decoder's weights chooses m for each level.

The frames before the first frame of a video are copies of it, so its convolution is one 2D convolution with the sum of
the taps. It is in no group; the groups of m frames start after it.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .convolution import conv2d

POINTS = {2: (1.0,), 4: (2 / 3, 3 / 2)}
"""For each m the positive points. 0, infinity and the negatives are points too."""

TOTAL = {2: 1, 4: 6}
"""Index of the sum of the taps in the transformed taps. It is that of point 1 if there is one, else appended."""

Matrix = tuple[tuple[float, ...], ...]


@cache
def matrices(m: int) -> tuple[Matrix, Matrix, Matrix]:
    """Return the matrices A [m, m + 2], B [m + 2, m + 2] and G [m + 2, 3] of F(m, 3)."""
    points = torch.tensor([0, *(sign * x for x in POINTS[m] for sign in (1, -1))], dtype=torch.float64)

    def powers(count: int) -> Tensor:
        infinity = torch.eye(count, dtype=torch.float64)[-1:]
        return torch.cat([points[:, None] ** torch.arange(count), infinity])

    three = powers(m).T, powers(m + 2).inverse().T.round(decimals=12), powers(3)
    return tuple(tuple(map(tuple, matrix.tolist())) for matrix in three)


class Products(NamedTuple):
    """The output of a convolution before the last sums, A p, and without its bias."""

    transformed: tuple[Tensor, ...]
    """p: m + 2 tensors [groups, H, W, out]."""
    first_frame: Tensor | None
    """The video's first frame, [1, H, W, out], or None if it is not one of these frames."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape [n, H, W, out] of the frames."""
        groups, *rest = self.transformed[0].shape
        return (self.first_frame is not None) + (len(self.transformed) - 2) * groups, *rest


def _combined(row: tuple[float, ...], tensors: tuple[Tensor, ...]) -> Tensor:
    """Return the sum of the tensors weighted by `row`, in at least float32."""
    total = torch.zeros_like(tensors[0], dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    for factor, tensor in zip(row, tensors, strict=True):
        if factor:
            total.add_(tensor, alpha=factor)
    return total


def transform_taps(weight: Tensor, dtype: torch.dtype, m: int) -> Tensor:
    """Transform weights [out, in, 3, 3, 3] to taps [m + 2 or m + 3, out, in, 3, 3] (see `TOTAL`).

    Each tap is channels-last and rounded to dtype once.
    """
    rows = matrices(m)[2]
    if TOTAL[m] == len(rows):
        rows = *rows, (1.0, 1.0, 1.0)
    taps = weight.new_empty(len(rows), weight.shape[0], *weight.shape[3:], weight.shape[1], dtype=dtype)
    taps = taps.permute(0, 1, 4, 2, 3)
    for tap, row in zip(taps, rows, strict=True):
        tap.copy_(_combined(row, weight.unbind(2)))
    return taps


def transform_frames(past: Tensor, frames: Tensor, out: Tensor) -> None:
    """Compute B d of past, [2, H, W, C], and frames, [m * groups, H, W, C], in out, [m + 2, groups, H, W, C]."""
    m = len(out) - 2
    before = torch.cat([past, frames])
    d = tuple(before[i : i + len(frames) : m] for i in range(m + 2))
    for target, row in zip(out, matrices(m)[1], strict=True):
        target.copy_(_combined(row, d))


def convolve(window: Tensor, first_frame: int, taps: Tensor) -> Products:
    """Convolve a window (see `kernels.fill_groups`) with taps, [>= m + 2, out, C, 3, 3]. Returns the products.

    first_frame: 1 if the window begins with the video's first frame, otherwise 0.
    """
    m = len(window) - 2
    first = _convolve(window[0, :1], taps[TOTAL[m]]) if first_frame else None
    return Products(
        tuple(_convolve(frames[first_frame:], tap) for frames, tap in zip(window, taps, strict=False)), first
    )


def _convolve(frames: Tensor, tap: Tensor) -> Tensor:
    return conv2d(frames.permute(0, 3, 1, 2), tap).permute(0, 2, 3, 1).contiguous()


def sum_products(products: Products) -> Tensor:
    """Compute the frames A p, [n, H, W, out], float32."""
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
