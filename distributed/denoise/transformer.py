"""HunyuanVideo-1.5's transformer without padding, masks, or synchronisation with the device within a forward.

It uses the weights of diffusers' `HunyuanVideo15Transformer3DModel` and computes the same function. Order of calls:

1. `encode`, once per prompt: embeds the conditions, trimmed to their valid tokens (`conditions.trim`).
2. `modulation`, once per step or for all steps at once: computes shifts, scales and gates of the blocks. They depend
   only on the timestep, and use a third of the weights.
3. `forward`, per step and condition: converts the latent's patches to tokens, of which each rank computes its share.
   Each block attends jointly to video and text, then applies an MLP to each. Returns rows of the prediction.

A single rank runs the same code without communication. Videos of a batch, and the two branches of guidance, are
computed one after the other, each with its own number of text tokens.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ranks.devices import Device
from .block import Stream, run_block
from .conditions import Condition, Context, encode, refine
from .fused import Rotation
from .parallel import plan
from .share import Share

AHEAD = 2
"""Blocks that the host may be ahead of the device if a forward has `on_block`, so that a cancel takes effect soon."""

OnBlock = Callable[[int, int], None]
"""Called between blocks with the number of finished blocks and of all blocks. An exception from it ends the forward."""


@dataclass(frozen=True)
class Modulation:
    """The modulation of one step.

    blocks: [layers, 2, 6, D]: for video and text, shift, scale and gate of attention, then of the MLP. final: [2, D]:
    shift and scale of the output norm. Scales include the added 1.
    """

    blocks: Tensor
    final: Tensor


class Transformer:
    """Runs a HunyuanVideo15Transformer3DModel. Raises ValueError if a layer has an adapter.

    The model's weights may move between devices between calls; no reference to them is kept. blocks: what a forward
    calls for its blocks, in order, and closes (see `stream.BlockStream`); None: those of the model.
    """

    def __init__(self, model: nn.Module, blocks: Callable[[], Generator[nn.Module, None, None]] | None = None) -> None:
        self.model = model
        self.blocks = blocks or functools.partial(_blocks_of, model)  # a method would be a reference cycle
        for name, module in model.named_modules():
            if hasattr(module, "base_layer"):
                raise ValueError(f"{name} has an adapter ({type(module).__name__}): fuse it with the weights first.")
        config = model.config
        self.patch = config.patch_size_t, config.patch_size, config.patch_size
        self.heads, self.head_dim = config.num_attention_heads, config.attention_head_dim
        self._rotation: tuple[object, Rotation | None] = None, None

    @property
    def dtype(self) -> torch.dtype:
        return self.model.x_embedder.proj.weight.dtype

    def grid(self, latent: Tensor) -> tuple[int, int, int]:
        """Return the number of tokens of a latent [C, t, h, w] along t, h and w."""
        t, h, w = (size // patch for size, patch in zip(latent.shape[1:], self.patch, strict=True))
        return t, h, w

    def whole(self, latent: Tensor) -> Share:
        """Return the share of a single rank: all tokens and heads."""
        t, h, w = self.grid(latent)
        return Share(plan(1, 1, t * h * w, self.heads, self.head_dim).branches[0])

    @torch.no_grad()
    def encode(self, condition: Condition) -> Context:
        """Embed a video's conditions, once for all steps."""
        return encode(self.model, condition)

    @torch.no_grad()
    def modulation(
        self, timesteps: Tensor, timesteps_r: Tensor | None = None, averaged: bool = False
    ) -> list[Modulation]:
        """Return the modulation of each timestep.

        timesteps: [n]. timesteps_r: [n], second times of MeanFlow models. averaged: average the embeddings of both
        times instead of adding them.
        """
        embed = self.model.time_embed
        temb = embed.timestep_embedder(embed.time_proj(timesteps).to(self.dtype))
        if timesteps_r is not None:
            temb = temb + embed.timestep_embedder_r(embed.time_proj_r(timesteps_r).to(self.dtype))
            temb = temb / 2 if averaged else temb
        temb = F.silu(temb)
        layers = [(block.norm1.linear, block.norm1_context.linear) for block in self.model.transformer_blocks]
        blocks = torch.stack([layer(temb) for pair in layers for layer in pair], 1)
        blocks = blocks.view(len(temb), len(layers), 2, 6, -1)
        final = self.model.norm_out.linear(temb).view(len(temb), 2, -1).flip(1)
        for scale in blocks[..., 1, :], blocks[..., 4, :], final[..., 1, :]:
            scale += 1
        return [Modulation(*step) for step in zip(blocks, final, strict=True)]

    @torch.no_grad()
    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        context: Context,
        modulation: Modulation,
        share: Share | None = None,
        on_block: OnBlock | None = None,
    ) -> Tensor:
        """Return the prediction for this rank's tokens, [tokens, channels of a patch] (see `unpatchify`).

        latent: [C, t, h, w], with its condition channels. timestep: [1]. A collective of the ranks of the share.
        """
        model, share = self.model, share or self.whole(latent)
        rotation = self._rotation_of(latent, share.tokens)
        blocks = [tuple(of_stream.unbind() for of_stream in of_block) for of_block in modulation.blocks.unbind()]
        norms = [(of_video[:2], of_text[:2]) for of_video, of_text in blocks]
        norms.append((modulation.final.unbind(), None))
        video = F.linear(self.patchify(latent)[share.tokens], *_flat(model.x_embedder.proj))
        video = Stream(video, norms[0][0], model.norm_out.norm.eps)
        text = Stream(refine(model, context, timestep), norms[0][1], model.norm_out.norm.eps)
        pace = _Pace(latent, on_block, len(model.transformer_blocks)) if on_block else None
        with contextlib.closing(self.blocks()) as modules:
            for block, of_block, following in zip(modules, blocks, norms[1:], strict=True):
                run_block(block, video, text, of_block, following, rotation, share)
                if pace:
                    pace.block_done()
        if pace:
            pace.finish()
        return model.proj_out(video.normed)

    def patchify(self, latent: Tensor) -> Tensor:
        """Convert a latent [C, t, h, w] to rows [tokens, C * patch]."""
        (t, h, w), (pt, ph, pw) = self.grid(latent), self.patch
        latent = latent[:, : t * pt, : h * ph, : w * pw].unflatten(3, (w, pw)).unflatten(2, (h, ph))
        return latent.unflatten(1, (t, pt)).permute(1, 3, 5, 0, 2, 4, 6).reshape(t * h * w, -1).to(self.dtype)

    def unpatchify(self, rows: Tensor, latent: Tensor) -> Tensor:
        """Convert all rows of a prediction, [tokens, C' * patch], to [C', t, h, w]. latent: the forward's input."""
        rows = rows.view(*self.grid(latent), -1, *self.patch).permute(3, 0, 4, 1, 5, 2, 6)
        return rows.flatten(5).flatten(3, 4).flatten(1, 2)

    def _rotation_of(self, latent: Tensor, tokens: slice) -> Rotation:
        """Return the rotation of this rank's tokens, cached until shape, share or device change."""
        key = latent.shape[1:], tokens.start, tokens.stop, latent.device
        if self._rotation[0] != key:
            cos, sin = (part[tokens, ::2].contiguous() for part in self.model.rope(latent[None]))
            self._rotation = key, (cos, sin)
        return self._rotation[1]


class _Pace:
    """Reports blocks as the device finishes them, and keeps the host at most `AHEAD` blocks ahead of it."""

    def __init__(self, latent: Tensor, on_block: OnBlock, blocks: int) -> None:
        self.device = Device(latent.device)
        self.on_block, self.blocks = on_block, blocks
        self.done, self.events = 0, collections.deque()

    def block_done(self) -> None:
        if self.device.is_host:
            self._report()
            return
        self.events.append(self.device.mark())
        if len(self.events) > AHEAD:
            self.events.popleft().synchronize()
            self._report()

    def finish(self) -> None:
        """Report the last blocks without waiting: the reader of the prediction waits for the device."""
        while self.done < self.blocks:
            self._report()

    def _report(self) -> None:
        self.done += 1
        self.on_block(self.done, self.blocks)


def _blocks_of(model: nn.Module) -> Generator[nn.Module, None, None]:
    yield from model.transformer_blocks


def _flat(layer: nn.Conv3d) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of a patch embedding as those of a linear layer."""
    return layer.weight.flatten(1), layer.bias
