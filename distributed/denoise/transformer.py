"""HunyuanVideo-1.5's transformer without what costs: no padding, no mask, no waiting for the device within a forward.

The weights are those of diffusers' `HunyuanVideo15Transformer3DModel`, and so is the function. The order of events:

1. `encode`, once per prompt: the conditions, cut to their valid tokens (`conditions.trim`), through their embedders.
2. `modulation`, once per step or for all steps at once: what the blocks' norms are modulated with. It depends on the
   timestep alone; a third of the weights serve nothing else.
3. `forward`, per step and condition: the latent's patches become tokens, of which a rank takes its share. Each block
   attends jointly to video and text, then transforms both by an MLP. Rows of the prediction come out.

One rank runs what several run, with the communication skipped. Videos of a batch, and the two branches of guidance, go
one after the other, each with its own number of text tokens.
"""

import collections
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Stream, run_block
from .conditions import Condition, Context, encode, refine
from .fused import Rotation
from .parallel import plan
from .share import Share

AHEAD = 2
"""Blocks that the host may be ahead of the device when somebody watches, so that a cancel is heard soon."""

OnBlock = Callable[[int, int], None]
"""Called between blocks with the number of blocks done and of all. What it raises ends the forward."""


@dataclass(frozen=True)
class Modulation:
    """Of one step: blocks [layers, 2, 6, D], for video and text; final [2, D]: shift and scale of the output norm.

    The six: shift, scale and gate of attention, then of the MLP. Scales have their one added.
    """

    blocks: Tensor
    final: Tensor


class Transformer:
    """Runs a HunyuanVideo15Transformer3DModel. Raises ValueError where a layer is not a plain linear one.

    The model's weights may move between devices from call to call; nothing is kept of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
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
        """Tokens of a latent [C, t, h, w] along each axis."""
        t, h, w = (size // patch for size, patch in zip(latent.shape[1:], self.patch, strict=True))
        return t, h, w

    def whole(self, latent: Tensor) -> Share:
        """The share of a process that computes alone."""
        t, h, w = self.grid(latent)
        return Share(plan(1, 1, t * h * w, self.heads, self.head_dim).branches[0])

    @torch.no_grad()
    def encode(self, condition: Condition) -> Context:
        """What a prompt gives to all steps."""
        return encode(self.model, condition)

    @torch.no_grad()
    def modulation(self, timesteps: Tensor, timesteps_r: Tensor | None = None) -> list[Modulation]:
        """The modulation of each of these timesteps, [n]. timesteps_r: the second time of meanflow models, [n]."""
        embed = self.model.time_embed
        temb = embed.timestep_embedder(embed.time_proj(timesteps).to(self.dtype))
        if timesteps_r is not None:
            temb = temb + embed.timestep_embedder_r(embed.time_proj_r(timesteps_r).to(self.dtype))
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
        """The prediction's rows of this rank's tokens, [tokens, channels of a patch]: see `unpatchify`.

        latent: [C, t, h, w], with its condition channels. timestep: [1]. Exchanges with the other ranks of the share.
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
        for block, of_block, following in zip(model.transformer_blocks, blocks, norms[1:], strict=True):
            run_block(block, video, text, of_block, following, rotation, share)
            if pace:
                pace.block_done()
        if pace:
            pace.finish()
        return model.proj_out(video.normed)

    def patchify(self, latent: Tensor) -> Tensor:
        """[C, t, h, w] -> [tokens, C * patch]."""
        (t, h, w), (pt, ph, pw) = self.grid(latent), self.patch
        latent = latent[:, : t * pt, : h * ph, : w * pw].unflatten(3, (w, pw)).unflatten(2, (h, ph))
        return latent.unflatten(1, (t, pt)).permute(1, 3, 5, 0, 2, 4, 6).reshape(t * h * w, -1).to(self.dtype)

    def unpatchify(self, rows: Tensor, latent: Tensor) -> Tensor:
        """All rows of the prediction, [tokens, C' * patch] -> [C', t, h, w]; latent: the input, for its shape."""
        rows = rows.view(*self.grid(latent), -1, *self.patch).permute(3, 0, 4, 1, 5, 2, 6)
        return rows.flatten(5).flatten(3, 4).flatten(1, 2)

    def _rotation_of(self, latent: Tensor, tokens: slice) -> Rotation:
        """Of this rank's tokens; computed when shape, share or device change."""
        key = latent.shape[1:], tokens.start, tokens.stop, latent.device
        if self._rotation[0] != key:
            cos, sin = (part[tokens, ::2].contiguous() for part in self.model.rope(latent[None]))
            self._rotation = key, (cos, sin)
        return self._rotation[1]


class _Pace:
    """Tells about blocks as the device finishes them, and keeps the host no more than `AHEAD` blocks ahead of it."""

    def __init__(self, latent: Tensor, on_block: OnBlock, blocks: int) -> None:
        self.device, self.at_once = latent.device, latent.is_cpu
        self.on_block, self.blocks = on_block, blocks
        self.done, self.events = 0, collections.deque()

    def block_done(self) -> None:
        if self.at_once:
            self._tell()
            return
        self.events.append(torch.get_device_module(self.device).current_stream(self.device).record_event())
        if len(self.events) > AHEAD:
            self.events.popleft().synchronize()
            self._tell()

    def finish(self) -> None:
        """Tell about the last blocks; what reads the prediction waits for the device anyway."""
        while self.done < self.blocks:
            self._tell()

    def _tell(self) -> None:
        self.done += 1
        self.on_block(self.done, self.blocks)


def _flat(layer: nn.Conv3d) -> tuple[Tensor, Tensor | None]:
    """A patch embedding's weight and bias as those of a linear layer."""
    return layer.weight.flatten(1), layer.bias
