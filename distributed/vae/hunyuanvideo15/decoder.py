"""HunyuanVideo-1.5's VAE decoder, run forward in time.

The function is that of `AutoencoderKLHunyuanVideo15.decoder` in diffusers (models/autoencoders/
autoencoder_kl_hunyuanvideo15.py), computed a few frames at a time. What makes that exact:

- A causal convolution of 3 frames needs the last two frames of its input. They stay in the `CausalCache` of its level.
- The attention needs the keys and values of earlier frames. They stay in `KeyValues`.
- An upsampling in time makes two frames of one, except of the video's first, which stays one.

The order of events, for one chunk of latent frames [n, H, W, 32]:

    trunk   conv_in, mid block (resnet, attention, resnet), resnets of the first up block     latent resolution
    tail    upsampler of the first up block; then level after level: resnets, upsampler       doubling each time
            norm_out, conv_out -> pixels, float32, black 0, white 1, not clamped

Where each of diffusers' modules (HunyuanVideo15...) went:

    Decoder3D       `Trunk._step`, then `Tail.run`; norm_out, conv_act and conv_out are `Tail._pixels` MidBlock
    `Trunk._step`, as are the resnets of the first UpBlock3D UpBlock3D       `Tail._level`, the first one's upsampler
    too ResnetBlock     `_Stage._resnet` RMS_norm, SiLU  `kernels.activate_`, in the pass before a convolution
    CausalConv3d    `_Stage._conv`: `kernels.fill_groups` pads, `winograd.convolve` convolves; `CausalCache` pads in
    time AttnBlock       `Trunk._attention` and `attention.KeyValues` Upsample        `Tail._upsample` and
    `kernels.upsample`

The decoder runs depth first: a level passes its few output frames on before it takes more input. So only a few frames
of each level are alive at any moment, whatever the length of the video.

Convolutions take frames in groups of m (`winograd`, `weights.frames_per_group`). Between two convolutions there is one
pass over memory (`kernels.fill_groups`): it adds up the products, the bias and the residual, normalises, activates, and
writes what the next convolution reads, with a border of one. The sum of a residual block is therefore carried as its
terms, a `LazySum`, until the next pass adds them. The length of steps does not change which frames form a group, so
frames are the same to the last bit.

If the picture is divided, between ranks or into blocks, `edges` overwrites the border with the neighbours' pixels
before each convolution. `edges` None means that the whole picture is here. A rank's region stays where it is. A block
moves over the picture, by one pixel with each convolution (see `Tail._residual`).
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
    """x + products + bias, of those that are given, not yet added up. If x is given, the sum is formed in it."""

    x: Tensor | None
    products: Products | None = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, H, W, C]"""
        return (self.products if self.x is None else self.x).shape

    def form(self) -> Tensor:
        """Return the sum, in x."""
        if self.products is not None:
            self.x.copy_(kernels.value_of(self.x, self.products, self.bias))
            self.release_terms()
        return self.x

    def release_terms(self) -> None:
        """Free the terms that have been added to x."""
        self.products = self.bias = None


class CausalCache:
    """The last two frames of what each convolution of a level has read.

    extents: the region of the picture that each convolution reads and, last, the one that the last convolution gives.
    """

    def __init__(self, extents: Sequence[Region], channels: int, like: Tensor) -> None:
        self.extents = extents
        self.frames = [like.new_empty(2, extent.height, extent.width, channels) for extent in extents[:-1]]
        self.first_chunk = [True] * len(self.frames)


Step = Generator[None, None, Any]
"""Work that yields whenever borders are on their way, and returns its result."""


class _Stage:
    """What trunk and tail have in common: convolutions and residual blocks on windows, and steps that take turns."""

    def __init__(self, weights: Weights, edges: Edges | None) -> None:
        self.weights, self.edges = weights, edges
        self.in_flight = edges.in_flight if edges else 1
        self.like = weights.taps

    def _interleave(self, steps: Iterable[Step]) -> Iterator[Tensor]:
        """Run steps, `in_flight` at a time: while one waits for borders, the next continues, or a new one begins.

        They take turns, the oldest first, so no step overtakes another. The caches rely on that.
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
        """Convolution `index` of a level, with norm and activation before it if `gamma` is given. `x` is formed."""
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

    time: latent frames in all. edges: given if the rest of the picture is on other ranks.
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
        """Consecutive chunks of latent frames, [n, H, W, latent channels] -> [n, H, W, C] each, sums formed."""
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
        """x + attention(x): [n, H, W, C], each frame to itself and to all earlier frames."""
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
    """The rest of the decoder, from the first upsampling to pixels.

    extents: what is computed, level by level. edges: given if the rest of the picture is on other ranks or in other
    blocks.
    """

    def __init__(
        self, weights: Weights, extents: Extents, steps: Steps, edges: Edges | MovingEdges | None = None
    ) -> None:
        super().__init__(weights, edges)
        self.extents, self.steps = extents, steps
        self.bounds = [hull(level) for level in extents]
        """Of each level the region that its residual stream covers."""
        *others, last = extents  # conv_out has a cache of its own
        self.caches = [
            CausalCache(level, width, self.like)
            for level, width in zip((*others, last[:-1]), weights.widths, strict=True)
        ]
        self.first_chunk = [True] * len(weights.upsamplers)
        self.conv_out_cache: tuple[Tensor, Tensor] | None = None

    def run(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The trunk's output within the first level's bounds, chunk by chunk -> pixels [frames, H, W, 3].

        They are those of the last extent: float32, black 0 and white 1, not clamped, a few frames at a time.
        """
        full_rate = self.weights.full_rate_level
        for level in range(full_rate):
            pieces = _pieces(chunks, self.steps.of(level, full_rate))
            chunks = self._interleave(map(partial(self._level, level), pieces))
        pieces = _pieces(chunks, self.steps.of(full_rate, full_rate))
        return self._interleave(map(partial(self._finish, full_rate), pieces))

    def _finish(self, level: int, x: Tensor) -> Step:
        """The levels at the full frame rate, one after the other, to pixels."""
        for i in range(level, len(self.weights.resnets)):
            x = yield from self._level(i, x)
        return x

    def _level(self, level: int, x: Tensor) -> Step:
        """One level of the tail. x: [n, H, W, C] within the level's bounds -> the same of the next level, or pixels."""
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
        """The residual stream, cropped to the region of convolution `after`. `before` is the one it last matched.

        A convolution needs one pixel beyond what it gives. A block has no pixels of the next block, so at their common
        line it gives one pixel less, and the next block computes that pixel. The line moves by one with each
        convolution. Here are the last columns of block a and the first ones of block b, its right neighbour, in one
        row:

            convolution 0 reads   a a a a a a|b b b b b      = extents[level][0]
            convolution 1 reads   a a a a a|b b b b b b      = extents[level][1]: what convolution 0 gives
            convolution 2 reads   a a a a|b b b b b b b      = extents[level][2]: what convolution 1 gives

        Where b begins, a convolution of b reads two columns of a. Block a has kept them of its own windows (see
        `block_borders`). The residual stream stays behind: it has been in memory since convolution 0. Before it is
        added to what convolution 1 gives, a drops its last two columns, and b prepends the same two, which a has kept.
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
        """norm_out and conv_out. The sum over time comes last, so that the cache is two maps of 3 channels."""
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
    """Split into pieces of `step` frames, the remainder first: a video's first frame is in no group of frames."""
    first = (len(frames) - 1) % step + 1
    return frames.split([first] + [step] * ((len(frames) - first) // step))


def _pieces(chunks: Iterable[Tensor], step: int) -> Iterator[Tensor]:
    return (piece for chunk in chunks for piece in split(chunk, step))


def _window(read: Region, given: Region) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size of a window for a convolution that gives `given`, and where in it what was read begins."""
    return (given.height + 2, given.width + 2), (read.top - given.top + 1, read.left - given.left + 1)


def _crop(frames: Tensor, bounds: Region, region: Region) -> Tensor:
    """A region of frames [n, H, W, C] that cover `bounds`."""
    top, left = region.top - bounds.top, region.left - bounds.left
    return frames[:, top : top + region.height, left : left + region.width]
