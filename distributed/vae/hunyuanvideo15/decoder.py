"""HunyuanVideo-1.5's VAE decoder, run forward in time.

The function is that of `AutoencoderKLHunyuanVideo15.decoder` in diffusers (models/autoencoders/
autoencoder_kl_hunyuanvideo15.py), computed a few frames at a time. What makes that exact:

- A causal convolution of 3 frames needs the last two frames of its input. They stay in the `Past` of its level.
- The attention needs the keys and values of earlier frames. They stay in `KeyValues`.
- An upsampling in time gives two frames for one, but one for the video's first.

The order of events, for one chunk of latent frames [n, H, W, 32]:

    trunk   conv_in, mid block (resnet, attention, resnet), resnets of the first up block     latent resolution
    tail    upsampler of the first up block; then level after level: resnets, upsampler       doubling each time
            norm_out, conv_out -> pixels, float32, black 0, white 1, not clamped

Where each of diffusers' modules (HunyuanVideo15...) went:

    Decoder3D       `Trunk._step`, then `Tail.run`; norm_out, conv_act and conv_out are `Tail._pixels`
    MidBlock        `Trunk._step`, as are the resnets of the first UpBlock3D
    UpBlock3D       `Tail._level`, the first one's upsampler too
    ResnetBlock     `_Part._resnet`
    RMS_norm, SiLU  `kernels.activate_`, in the pass before a convolution
    CausalConv3d    `_Part._conv`: `kernels.fill_groups` pads, `winograd.convolve` convolves; `Past` pads in time
    AttnBlock       `Trunk._attention` and `attention.KeyValues`
    Upsample        `Tail._upsample` and `kernels.upsample`

All goes depth first: a level hands its few output frames on before it takes more input, so what is alive at any
moment is a few frames of each level, whatever the length of the video.

Convolutions take frames in groups (`winograd`): four at a time at the video's own frame rate, with half of the
multiplications, and two before, with two thirds: groups of four one level earlier would make bfloat16's error larger
than diffusers' own. What lies between them is one pass (`kernels.fill_groups`): it adds up the products, the bias and
the residual, normalises, activates, and writes with a border of one what the next convolution reads. The sum of a
residual block is therefore carried in parts, `Pending`, until the next pass adds them. The length of steps does not
change which frames form a group, so frames are the same to the last bit.

Where the picture is divided, between ranks or into blocks, `edges` overwrites the border with the neighbours' pixels
before each convolution; `edges` None means that the whole picture is here. A rank's region stays where it is; a block
moves over the picture, a pixel with each convolution (`regions.blocks`), and the stream of its residual blocks with it.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import kernels
from ...ops.attention import KeyValues
from ...ops.winograd import Products, convolve, transform_taps
from ..regions import Extents, Region, hull

LANES = 2
"""Steps in flight in each part when borders travel: one computes while the other's borders are under way."""


class Edges(Protocol):
    """What a region needs from its neighbours. See `halo.Mesh` and `seams.SeamEdges`."""

    lanes: int
    """Steps that may be in flight."""

    def start(self, window: Tensor) -> "Exchange":
        """Begin to fetch the border of `window`, [n, H + 2, W + 2, C], from the neighbours."""


class MovingEdges(Edges, Protocol):
    """What a block needs too: it moves."""

    def move(self, frames: Tensor, by: int) -> None:
        """Put in place the first `by` rows and columns of `frames`, [n, H, W, C], which it now needs."""


class WholeEdges(Edges, Protocol):
    """What the trunk needs too: all regions are computed at once."""

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [n, positions, C] each, of the whole picture."""

    @property
    def positions(self) -> int:
        """Latent positions of all regions together."""


class Exchange(Protocol):
    def finish(self) -> None:
        """Return when the border is in place for whatever is computed next."""


@dataclass(frozen=True)
class Steps:
    """Frames taken at a time: latent frames by the trunk, by the tail those of the video's own frame rate.

    trunk is a multiple of 2, tail of 4, so that no group of frames is ever cut.
    """

    trunk: int
    tail: int

    def __post_init__(self) -> None:
        if min(self.trunk, self.tail) < 1 or self.trunk % 2 or self.tail % 4:
            raise ValueError(f"{self}: trunk must be a multiple of 2 and tail one of 4.")

    def of(self, level: int, flat: int) -> int:
        """Frames that a level takes at a time; `flat` is the first at the video's own frame rate.

        Those between take twice as many: they have few pixels, and a large GPU would be half idle (at 720x1280 in two
        blocks all convolutions of 1024 channels took 14 % less with 8 frames here than with 4, H100, 2026-11-24).
        """
        if level == 0:
            return self.trunk
        return self.tail if level >= flat else 2 * self.tail


class Conv(NamedTuple):
    group: int
    """Frames that are convolved together."""
    taps: Tensor
    """[>= group + 2, out, in, 3, 3], transformed (see `winograd`)."""
    bias: Tensor
    """[out], float32."""


class Resnet(NamedTuple):
    norm1: Tensor
    conv1: Conv
    norm2: Tensor
    conv2: Conv


class Upsampler(NamedTuple):
    conv: Conv
    temporal: bool


class Attention(NamedTuple):
    norm: Tensor
    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    value: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]


@dataclass
class Pending:
    """A sum not yet formed: x + products + bias, of what there is. Where x is there, it is formed in x."""

    x: Tensor | None
    products: Products | None = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, H, W, C]"""
        return (self.products if self.x is None else self.x).shape

    def form(self) -> Tensor:
        """The sum, in x."""
        if self.products is not None:
            self.x.copy_(kernels.value_of(self.x, self.products, self.bias))
            self.formed()
        return self.x

    def formed(self) -> None:
        """Let go of the parts that have been used up."""
        self.products = self.bias = None


class Weights:
    """The decoder's weights on a device, in the order in which they are used.

    `tensors` has diffusers' names without the leading "decoder."; widths, depth and which upsamplers double time are
    read off the shapes.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        def vector(name: str) -> Tensor:
            return tensors[name].flatten().to(device=device, dtype=torch.float32)

        def matrix(name: str) -> tuple[Tensor, Tensor]:
            weight = tensors[f"{name}.weight"].flatten(1).to(device=device, dtype=dtype)
            return weight, vector(f"{name}.bias").to(dtype)

        def conv(name: str, group: int = 2) -> Conv:
            weight = tensors[f"{name}.conv.weight"].to(device)
            return Conv(group, transform_taps(weight, dtype, group), vector(f"{name}.conv.bias"))

        def resnet(name: str, group: int = 2) -> Resnet:
            return Resnet(
                vector(f"{name}.norm1.gamma"),
                conv(f"{name}.conv1", group),
                vector(f"{name}.norm2.gamma"),
                conv(f"{name}.conv2", group),
            )

        def count(prefix: str) -> int:
            return len({name[len(prefix) + 1 :].split(".")[0] for name in tensors if name.startswith(f"{prefix}.")})

        self.device, self.dtype = device, dtype
        self.conv_in = conv("conv_in")
        self.mid = tuple(resnet(f"mid_block.resnets.{i}") for i in range(2))
        name = "mid_block.attentions.0"
        self.attention = Attention(
            vector(f"{name}.norm.gamma"),
            *(matrix(f"{name}.{part}") for part in ("to_q", "to_k", "to_v", "proj_out")),
        )
        self.blocks: list[tuple[Resnet, ...]] = []
        self.upsamplers: list[Upsampler] = []
        self.rates: list[int] = []
        """Frames of each level for a latent frame, but for the video's first, which is one frame everywhere."""
        for i in range(count("up_blocks")):
            block = f"up_blocks.{i}"
            self.rates.append(2 ** sum(up.temporal for up in self.upsamplers))
            group = 4 if self.rates[i] % 4 == 0 else 2
            self.blocks.append(tuple(resnet(f"{block}.resnets.{j}", group) for j in range(count(f"{block}.resnets"))))
            if f"{block}.upsamplers.0.conv.conv.weight" in tensors:
                up = conv(f"{block}.upsamplers.0.conv", group)
                following = tensors[f"up_blocks.{i + 1}.resnets.0.conv1.conv.weight"].shape[1]
                self.upsamplers.append(Upsampler(up, temporal=len(up.bias) == 8 * following))
        self.norm_out = vector("norm_out.gamma")
        self.conv_out_bias = vector("conv_out.conv.bias")
        # [colour, C, t, y, x] -> one row for each (t, y, x, colour), padded to a multiple of 16 rows
        last = tensors["conv_out.conv.weight"].to(device=device, dtype=dtype)
        taps = last.permute(2, 3, 4, 0, 1).flatten(0, 3)
        self.taps = F.pad(taps, (0, 0, 0, -len(taps) % 16)).contiguous()
        self.widths = tuple(len(block[0].conv1.bias) for block in self.blocks)
        self.latent_channels = self.conv_in.taps.shape[2]

    @property
    def flat(self) -> int:
        """The first level of the tail that runs at the video's own frame rate. Levels are numbered from 1."""
        return 1 + max((i for i, up in enumerate(self.upsamplers) if up.temporal), default=-1)

    @property
    def convs(self) -> tuple[int, ...]:
        """Convolutions of each level of the tail, the last of which is the upsampler's or that to pixels."""
        return (1, *(2 * len(block) + 1 for block in self.blocks[1:]))

    @cached_property
    def nbytes(self) -> int:
        """Bytes that the weights take on the device."""
        total = 0
        stack: list = [v for v in vars(self).values()]
        while stack:
            item = stack.pop()
            if isinstance(item, Tensor):
                total += item.nbytes
            elif isinstance(item, tuple | list):
                stack.extend(item)
        return total


class Past:
    """The last two frames of what each convolution of a level has read.

    extents: the part of the picture that each reads and, last, that the last one gives.
    """

    def __init__(self, extents: Sequence[Region], channels: int, like: Tensor) -> None:
        self.extents = extents
        self.frames = [like.new_empty(2, extent.height, extent.width, channels) for extent in extents[:-1]]
        self.fresh = [True] * len(self.frames)


Step = Generator[None, None, Any]
"""Work that yields whenever borders are under way, and returns its result."""


class _Part:
    """What trunk and tail have in common: convolutions and residual blocks on windows, and steps that take turns."""

    def __init__(self, weights: Weights, edges: Edges | None) -> None:
        self.weights, self.edges = weights, edges
        self.lanes = edges.lanes if edges else 1
        self.like = weights.taps

    def _in_lanes(self, steps: Iterable[Step]) -> Iterator[Tensor]:
        """Run steps, some at a time: whenever one waits for borders, the next goes on, or begins.

        They take turns, the oldest first, so no step ever overtakes another, which the past relies on.
        """
        coming = iter(steps)
        running: list[Step] = []
        while True:
            if len(running) < self.lanes and (step := next(coming, None)):
                running.append(step)
            if not running:
                return
            for step in tuple(running):
                try:
                    next(step)
                except StopIteration as end:
                    running.remove(step)
                    yield end.value

    def _resnet(self, past: Past, index: int, x: Pending, resnet: Resnet):
        hidden = Pending(None, (yield from self._conv(past, index, x, resnet.conv1, resnet.norm1)), resnet.conv1.bias)
        out = yield from self._conv(past, index + 1, hidden, resnet.conv2, resnet.norm2)
        return Pending(x.x, out, resnet.conv2.bias)

    def _borders(self, window: Tensor) -> Step:
        if self.edges:
            exchange = self.edges.start(window)
            yield
            exchange.finish()

    def _conv(self, past: Past, index: int, x: Pending, conv: Conv, gamma: Tensor | None = None) -> Step:
        """Convolution `index` of a level; a sum is formed on the way."""
        n, channels = x.shape[0], x.shape[-1]
        groups, alone = divmod(n, conv.group)
        size, corner = _window(*past.extents[index : index + 2])
        window = self.like.new_empty(conv.group + 2, groups + alone, *size, channels)
        fresh, past.fresh[index] = past.fresh[index], False
        kernels.fill_groups(x.x, x.products, past.frames[index], window, corner, fresh=fresh, bias=x.bias, gamma=gamma)
        x.formed()
        yield from self._borders(window.flatten(0, 1))
        return convolve(window, alone, conv.taps)


class Trunk(_Part):
    """The first part of the decoder, at latent resolution, for one video or one part of its picture.

    time: latent frames in all. edges: the rest of the picture is on other ranks.
    """

    def __init__(self, weights: Weights, height: int, width: int, time: int, edges: WholeEdges | None = None) -> None:
        super().__init__(weights, edges)
        convs = 2 * len(weights.mid) + 2 * len(weights.blocks[0])
        part = Region(0, height, 0, width)
        self.entry = Past((part, part), weights.latent_channels, self.like)
        self.base = Past((part,) * (convs + 1), weights.widths[0], self.like)
        positions = edges.positions if edges else height * width
        self.memory = KeyValues(time, positions, weights.widths[0], weights.dtype, weights.device)

    def run(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Consecutive chunks of latent frames, [n, H, W, latent channels] -> [n, H, W, C] each, sums formed."""
        return self._in_lanes(map(self._step, chunks))

    def _step(self, latent: Tensor) -> Step:
        w = self.weights
        shortcut = latent.repeat_interleave(w.widths[0] // w.latent_channels, dim=-1)
        x = Pending(shortcut, (yield from self._conv(self.entry, 0, Pending(latent), w.conv_in)), w.conv_in.bias)
        x = yield from self._resnet(self.base, 0, x, w.mid[0])
        x = Pending(self._attention(x.form()))
        x = yield from self._resnet(self.base, 2, x, w.mid[1])
        for i, resnet in enumerate(w.blocks[0]):
            x = yield from self._resnet(self.base, 4 + 2 * i, x, resnet)
        return x.form()

    def _attention(self, x: Tensor) -> Tensor:
        a = self.weights.attention
        n, height, width, channels = x.shape
        flat = x.view(n, height * width, channels)
        scale = channels**0.5 * a.norm
        normed = (F.normalize(flat.float(), dim=-1) * scale).to(x.dtype)
        queries = F.linear(normed, *a.query)
        keys, values = F.linear(normed, *a.key), F.linear(normed, *a.value)
        if self.edges:
            keys, values = self.edges.gather(keys, values)
        attended = []
        for q, k, v in zip(queries, keys, values, strict=True):
            self.memory.append(k, v)
            attended.append(self.memory.attend(q))
        return x + F.linear(torch.stack(attended), *a.out).view(x.shape)


class Tail(_Part):
    """The rest of the decoder, from the first upsampling to pixels.

    edges: the rest of the picture is on other ranks, or in other blocks.
    """

    def __init__(
        self, weights: Weights, extents: Extents, steps: Steps, edges: Edges | MovingEdges | None = None
    ) -> None:
        super().__init__(weights, edges)
        self.extents, self.steps = extents, steps
        self.rooms = [hull(level) for level in extents]
        *others, last = extents  # to make pixels looks back by itself
        self.levels = [
            Past(level, width, self.like) for level, width in zip((*others, last[:-1]), weights.widths, strict=True)
        ]
        self.begun = [False] * len(weights.upsamplers)
        self.late: tuple[Tensor, Tensor] | None = None

    def run(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """What the trunk gave of the first level's extents, chunk by chunk -> pixels [frames, H, W, 3] of the last.

        float32, black 0 and white 1, not clamped, a few frames at a time.
        """
        flat = self.weights.flat
        for level in range(flat):
            pieces = _pieces(chunks, self.steps.of(level, flat))
            chunks = self._in_lanes(map(partial(self._level, level), pieces))
        pieces = _pieces(chunks, self.steps.of(flat, flat))
        return self._in_lanes(map(partial(self._finish, flat), pieces))

    def _finish(self, level: int, x: Tensor) -> Step:
        """The flat levels, one after the other, to pixels."""
        for i in range(level, len(self.weights.blocks)):
            x = yield from self._level(i, x)
        return x

    def _level(self, level: int, x: Tensor) -> Step:
        """x: [n, H, W, C], as large as all of the level's extents together."""
        w, past = self.weights, self.levels[level]
        pending = Pending(_cut_out(x, self.rooms[level], past.extents[0]))
        blocks = w.blocks[level] if level else ()
        for i, resnet in enumerate(blocks):
            pending = yield from self._resnet(past, 2 * i, pending, resnet)
            pending.x = self._moved(x, level, 2 * i, 2 * i + 2)
        if level == len(w.upsamplers):
            return (yield from self._pixels(pending))
        last = 2 * len(blocks)
        packed = yield from self._conv(past, last, pending, w.upsamplers[level].conv)
        return self._upsample(level, packed, self._moved(x, level, last, last + 1))

    def _moved(self, x: Tensor, level: int, before: int, after: int) -> Tensor:
        """Of a level's stream what convolution `after` goes with, where that is not what `before` went with."""
        old, new = self.extents[level][before], self.extents[level][after]
        if self.edges and old != new:
            self.edges.move(_cut_out(x, self.rooms[level], hull((old, new))), after - before)
        return _cut_out(x, self.rooms[level], new)

    def _upsample(self, level: int, packed: Products, shortcut: Tensor) -> Tensor:
        up, first = self.weights.upsamplers[level], not self.begun[level]
        self.begun[level] = True
        frames = packed.shape[0] * (1 + up.temporal) - (up.temporal and first)
        here, there, room = self.extents[level][-1], self.extents[level + 1][0], self.rooms[level + 1]
        out = self.like.new_empty(frames, room.height, room.width, self.weights.widths[level + 1])
        corner = there.top - 2 * here.top, there.left - 2 * here.left
        kernels.upsample(
            packed, up.conv.bias, shortcut, _cut_out(out, room, there), corner, temporal=up.temporal, first=first
        )
        return out

    def _pixels(self, x: Pending) -> Step:
        """norm_out and conv_out, the sum over time last: then two small maps are all there is to keep of the past."""
        w = self.weights
        n, channels = x.shape[0], x.shape[-1]
        size, corner = _window(*self.extents[-1][-2:])
        window = self.like.new_empty(n, *size, channels)
        kernels.fill_window(x.x, x.products, window, corner, bias=x.bias, gamma=w.norm_out)
        x.formed()
        yield from self._borders(window)
        oldest, older, newest = kernels.sum_taps(kernels.taps(window, w.taps), w.conv_out_bias).unbind(1)
        if self.late is None:
            self.late = oldest[:1].expand(2, -1, -1, -1), older[:1]
        oldest, older = torch.cat([self.late[0], oldest]), torch.cat([self.late[1], older])
        self.late = oldest[n:].clone(), older[n:].clone()
        return newest + oldest[:n] + older[:n]


def split(frames: Tensor, step: int) -> tuple[Tensor, ...]:
    """Pieces of `step` frames, the remainder first: a video's first frame stands alone, and groups follow it."""
    first = (len(frames) - 1) % step + 1
    return frames.split([first] + [step] * ((len(frames) - first) // step))


def _pieces(chunks: Iterable[Tensor], step: int) -> Iterator[Tensor]:
    return (piece for chunk in chunks for piece in split(chunk, step))


def _window(read: Region, given: Region) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size of a window for a convolution that gives `given`, and where in it what was read begins."""
    return (given.height + 2, given.width + 2), (read.top - given.top + 1, read.left - given.left + 1)


def _cut_out(frames: Tensor, room: Region, part: Region) -> Tensor:
    """Of frames [n, H, W, C] that show `room`, a part."""
    top, left = part.top - room.top, part.left - room.left
    return frames[:, top : top + part.height, left : left + part.width]
