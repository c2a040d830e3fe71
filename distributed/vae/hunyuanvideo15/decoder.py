"""HunyuanVideo-1.5's VAE decoder, run forward in time.

It computes the same function as `AutoencoderKLHunyuanVideo15.decoder` in diffusers (models/autoencoders/
autoencoder_kl_hunyuanvideo15.py), a few frames at a time. The result is exact because of the following state:

- A causal convolution over 3 frames needs the last two frames of its earlier input: the `CausalCache` of its level.
- The attention needs the keys and values of earlier frames: `KeyValues`.
- Temporal upsampling makes two frames of each frame, except of the video's first, which stays one.

Order of operations for one chunk of latent frames [n, H, W, 32]:

    trunk   conv_in, mid block (resnet, attention, resnet), resnets of the first up block     latent resolution
    tail    upsampler of the first up block; then for each level: resnets, upsampler          doubled at each level
            norm_out, conv_out -> pixels, float32, black 0, white 1, not clamped

diffusers' modules (HunyuanVideo15...) and the code here:

    Decoder3D         `Trunk._step`, then `Tail.run`; norm_out, conv_act and conv_out are in `Tail._pixels`
    MidBlock          `Trunk._step`, which also has the resnets of the first UpBlock3D
    UpBlock3D         `Tail._level`, which also has the upsampler of the first UpBlock3D
    ResnetBlock       `_Stage._resnet`
    RMS_norm, SiLU    `kernels.activate_`, in the pass before a convolution
    CausalConv3d      `_Stage._conv`: `kernels.fill_groups` pads in space, `CausalCache` pads in time, and
                      `winograd.convolve` convolves
    AttnBlock         `Trunk._attention` and `attention.KeyValues`
    Upsample          `Tail._upsample` and `kernels.upsample`

The decoder runs depth first: a level passes its few output frames to the next level before it reads more input. So only
a few frames of each level are in memory at any time, for a video of any length.

Convolutions process frames in groups of m (`winograd`, `weights.frames_per_group`). One pass over memory runs between
two convolutions (`kernels.fill_groups`): it sums the products, the bias and the residual, normalises, activates, and
writes the input of the next convolution, with a border of one pixel. The sum of a residual block is therefore passed on
as its terms, a `LazySum`, until the next pass adds them. The step length does not change which frames form a group, so
frames are bitwise the same for any step length.

If the picture is divided between ranks or into blocks, `edges` overwrites the border with the neighbours' pixels before
each convolution. With `edges` None the picture is not divided. The region of a rank is fixed. A block moves over the
picture by one pixel with each convolution (see `Tail._residual`).
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import kernels
from ...ops.attention import KeyValues
from ...ops.winograd import Products, convolve
from ..interface import Edges, MovingEdges, Steps, WholeEdges
from ..regions import Extents, Region, hull
from .weights import Conv, Resnet, Weights


@dataclass
class LazySum:
    """The sum of those of x, products and bias that are not None, not computed yet. `form` computes it in x."""

    x: Tensor | None
    products: Products | None = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, H, W, C]"""
        return (self.products if self.x is None else self.x).shape

    def form(self) -> Tensor:
        """Compute the sum in x, in place, and return it."""
        if self.products is not None:
            self.x.copy_(kernels.value_of(self.x, self.products, self.bias))
            self.release_terms()
        return self.x

    def release_terms(self) -> None:
        """Free the terms that were added to x."""
        self.products = self.bias = None


class CausalCache:
    """The last two input frames of each convolution of a level.

    extents: the input region of each convolution, then the output region of the last convolution.
    """

    def __init__(self, extents: Sequence[Region], channels: int, like: Tensor) -> None:
        self.extents = extents
        self.frames = [like.new_empty(2, extent.height, extent.width, channels) for extent in extents[:-1]]
        self.first_chunk = [True] * len(self.frames)


Step = Generator[None, None, Any]
"""A coroutine that yields while borders are in flight, and returns its result."""


class _Stage:
    """Base of trunk and tail: convolutions and residual blocks on windows, and the interleaving of steps."""

    def __init__(self, weights: Weights, edges: Edges | None) -> None:
        self.weights, self.edges = weights, edges
        self.in_flight = edges.in_flight if edges else 1
        self.like = weights.taps

    def _interleave(self, steps: Iterable[Step]) -> Iterator[Tensor]:
        """Run steps, `in_flight` at a time: while one waits for borders, the next one continues or a new one starts.

        They run in turn, the oldest first, so no step overtakes another. The caches depend on that order.
        """
        coming = iter(steps)
        running: list[Step] = []
        while True:
            if len(running) < self.in_flight and (step := next(coming, None)):
                running.append(step)
            if not running:
                return
            for step in tuple(running):
                try:
                    next(step)
                except StopIteration as end:
                    running.remove(step)
                    yield end.value

    def _resnet(self, cache: CausalCache, index: int, x: LazySum, resnet: Resnet):
        hidden = LazySum(None, (yield from self._conv(cache, index, x, resnet.conv1, resnet.norm1)), resnet.conv1.bias)
        out = yield from self._conv(cache, index + 1, hidden, resnet.conv2, resnet.norm2)
        return LazySum(x.x, out, resnet.conv2.bias)

    def _borders(self, window: Tensor) -> Step:
        if self.edges:
            exchange = self.edges.start(window)
            yield
            exchange.finish()

    def _conv(self, cache: CausalCache, index: int, x: LazySum, conv: Conv, gamma: Tensor | None = None) -> Step:
        """Run convolution `index` of a level, with norm and activation before it if `gamma` is given. Forms `x`."""
        n, channels = x.shape[0], x.shape[-1]
        groups, first_frame = divmod(n, conv.m)  # the video's first frame is in no group
        size, corner = _window(*cache.extents[index : index + 2])
        window = self.like.new_empty(conv.m + 2, groups + first_frame, *size, channels)
        first_chunk, cache.first_chunk[index] = cache.first_chunk[index], False
        kernels.fill_groups(
            x.x, x.products, cache.frames[index], window, corner, first_chunk=first_chunk, bias=x.bias, gamma=gamma
        )
        x.release_terms()
        yield from self._borders(window.flatten(0, 1))
        return convolve(window, first_frame, conv.taps)


class Trunk(_Stage):
    """The first stage of the decoder, at latent resolution, for one video or one region of its picture.

    time: latent frames of the video. edges: given if other ranks decode the rest of the picture.
    """

    def __init__(self, weights: Weights, height: int, width: int, time: int, edges: WholeEdges | None = None) -> None:
        super().__init__(weights, edges)
        convs = 2 * len(weights.mid) + 2 * len(weights.resnets[0])
        region = Region(0, height, 0, width)
        self.conv_in_cache = CausalCache((region, region), weights.latent_channels, self.like)
        self.cache = CausalCache((region,) * (convs + 1), weights.widths[0], self.like)
        positions = edges.positions if edges else height * width
        self.memory = KeyValues(time, positions, weights.widths[0], weights.dtype, weights.device)

    def run(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Map consecutive chunks of latent frames, [n, H, W, latent channels], to features, [n, H, W, C] each."""
        return self._interleave(map(self._step, chunks))

    def _step(self, latent: Tensor) -> Step:
        w = self.weights
        shortcut = latent.repeat_interleave(w.widths[0] // w.latent_channels, dim=-1)
        x = LazySum(
            shortcut, (yield from self._conv(self.conv_in_cache, 0, LazySum(latent), w.conv_in)), w.conv_in.bias
        )
        x = yield from self._resnet(self.cache, 0, x, w.mid[0])
        x = LazySum(self._attention(x.form()))
        x = yield from self._resnet(self.cache, 2, x, w.mid[1])
        for i, resnet in enumerate(w.resnets[0]):
            x = yield from self._resnet(self.cache, 4 + 2 * i, x, resnet)
        return x.form()

    def _attention(self, x: Tensor) -> Tensor:
        """Return x + attention(x), [n, H, W, C]. Each frame attends to itself and to all earlier frames."""
        weights = self.weights.attention
        n, height, width, channels = x.shape
        positions = x.view(n, height * width, channels)
        scale = channels**0.5 * weights.norm
        normed = (F.normalize(positions.float(), dim=-1) * scale).to(x.dtype)
        queries = F.linear(normed, *weights.query)
        keys, values = F.linear(normed, *weights.key), F.linear(normed, *weights.value)
        if self.edges:
            keys, values = self.edges.gather(keys, values)
        attended = []
        for q, k, v in zip(queries, keys, values, strict=True):
            self.memory.append(k, v)
            attended.append(self.memory.attend(q))
        return x + F.linear(torch.stack(attended), *weights.out).view(x.shape)


class Tail(_Stage):
    """The second stage of the decoder, from the first upsampling to pixels.

    extents: the regions computed at each level. edges: given if the rest of the picture is decoded by other ranks or in
    other blocks.
    """

    def __init__(
        self, weights: Weights, extents: Extents, steps: Steps, edges: Edges | MovingEdges | None = None
    ) -> None:
        super().__init__(weights, edges)
        self.extents, self.steps = extents, steps
        self.bounds = [hull(level) for level in extents]
        """The region that the residual stream covers at each level."""
        *others, last = extents  # conv_out has a cache of its own
        self.caches = [
            CausalCache(level, width, self.like)
            for level, width in zip((*others, last[:-1]), weights.widths, strict=True)
        ]
        self.first_chunk = [True] * len(weights.upsamplers)
        self.conv_out_cache: tuple[Tensor, Tensor] | None = None

    def run(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Map chunks of the trunk's output, within the first level's bounds, to pixels [frames, H, W, 3].

        The pixels are those of the last extent, a few frames at a time: float32, black 0, white 1, not clamped.
        """
        full_rate = self.weights.full_rate_level
        for level in range(full_rate):
            pieces = _pieces(chunks, self.steps.of(level, full_rate))
            chunks = self._interleave(map(partial(self._level, level), pieces))
        pieces = _pieces(chunks, self.steps.of(full_rate, full_rate))
        return self._interleave(map(partial(self._finish, full_rate), pieces))

    def _finish(self, level: int, x: Tensor) -> Step:
        """Run the levels at the full frame rate one after the other. Returns pixels."""
        for i in range(level, len(self.weights.resnets)):
            x = yield from self._level(i, x)
        return x

    def _level(self, level: int, x: Tensor) -> Step:
        """Run one level. x: [n, H, W, C] within its bounds. Returns the next level's x, or pixels."""
        w, cache = self.weights, self.caches[level]
        pending = LazySum(_crop(x, self.bounds[level], cache.extents[0]))
        resnets = w.resnets[level] if level else ()
        for i, resnet in enumerate(resnets):
            pending = yield from self._resnet(cache, 2 * i, pending, resnet)
            pending.x = self._residual(x, level, 2 * i, 2 * i + 2)
        if level == len(w.upsamplers):
            return (yield from self._pixels(pending))
        last = 2 * len(resnets)
        packed = yield from self._conv(cache, last, pending, w.upsamplers[level].conv)
        return self._upsample(level, packed, self._residual(x, level, last, last + 1))

    def _residual(self, x: Tensor, level: int, before: int, after: int) -> Tensor:
        """Return the residual stream cropped to the region of convolution `after`. It last matched that of `before`.

        A convolution reads one pixel more on each side than it computes. A block has no pixels of the next block, so at
        their common line it computes one pixel less, and the next block computes that pixel. The line moves by one
        pixel with each convolution. These are the last columns of block a and the first ones of its right neighbour,
        block b, in one row:

            convolution 0 reads   a a a a a a|b b b b b      = extents[level][0]
            convolution 1 reads   a a a a a|b b b b b b      = extents[level][1]: output of convolution 0
            convolution 2 reads   a a a a|b b b b b b b      = extents[level][2]: output of convolution 1

        At the line a convolution of b reads two columns of a. Block a stored them from its own windows (see
        `block_borders`). The residual stream does not move by itself: it has the region of convolution 0. Before it is
        added to the output of convolution 1, a drops its last two columns and b prepends these two, which a stored.
        """
        old, new = self.extents[level][before], self.extents[level][after]
        if self.edges and old != new:
            self.edges.move(_crop(x, self.bounds[level], hull((old, new))), after - before)
        return _crop(x, self.bounds[level], new)

    def _upsample(self, level: int, packed: Products, shortcut: Tensor) -> Tensor:
        up, first = self.weights.upsamplers[level], self.first_chunk[level]
        self.first_chunk[level] = False
        frames = packed.shape[0] * (1 + up.temporal) - (up.temporal and first)
        source, target, bounds = self.extents[level][-1], self.extents[level + 1][0], self.bounds[level + 1]
        out = self.like.new_empty(frames, bounds.height, bounds.width, self.weights.widths[level + 1])
        corner = target.top - 2 * source.top, target.left - 2 * source.left
        kernels.upsample(
            packed, up.conv.bias, shortcut, _crop(out, bounds, target), corner, temporal=up.temporal, first=first
        )
        return out

    def _pixels(self, x: LazySum) -> Step:
        """Run norm_out and conv_out. The sum over time comes last, so the cache is only two maps of 3 channels."""
        w = self.weights
        n, channels = x.shape[0], x.shape[-1]
        size, corner = _window(*self.extents[-1][-2:])
        window = self.like.new_empty(n, *size, channels)
        kernels.fill_window(x.x, x.products, window, corner, bias=x.bias, gamma=w.norm_out)
        x.release_terms()
        yield from self._borders(window)
        oldest, older, newest = kernels.sum_taps(kernels.taps(window, w.taps), w.conv_out_bias).unbind(1)
        if self.conv_out_cache is None:
            self.conv_out_cache = oldest[:1].expand(2, -1, -1, -1), older[:1]
        oldest, older = torch.cat([self.conv_out_cache[0], oldest]), torch.cat([self.conv_out_cache[1], older])
        self.conv_out_cache = oldest[n:].clone(), older[n:].clone()
        return newest + oldest[:n] + older[:n]


def split(frames: Tensor, step: int) -> tuple[Tensor, ...]:
    """Split frames into pieces of `step`, the shorter piece first: a video's first frame is in no group."""
    first = (len(frames) - 1) % step + 1
    return frames.split([first] + [step] * ((len(frames) - first) // step))


def _pieces(chunks: Iterable[Tensor], step: int) -> Iterator[Tensor]:
    return (piece for chunk in chunks for piece in split(chunk, step))


def _window(read: Region, given: Region) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the window size of a convolution that computes `given`, and the corner of its input `read` in it."""
    return (given.height + 2, given.width + 2), (read.top - given.top + 1, read.left - given.left + 1)


def _crop(frames: Tensor, bounds: Region, region: Region) -> Tensor:
    """Return the view of `region` in frames [n, H, W, C] that cover `bounds`."""
    top, left = region.top - bounds.top, region.left - bounds.left
    return frames[:, top : top + region.height, left : left + region.width]
