"""The transformer's conditions, trimmed to their valid tokens.

diffusers pads text to a fixed length and masks the padding in every attention. Valid tokens never attend to padding, so
the result without padding is the same and needs no mask. The number of valid tokens is read once per prompt, in `trim`;
later steps use the shapes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """One video's conditions: text [n, C], glyphs [m, C'] (the quoted text, encoded by ByT5) and image [k, C''].

    m and k may be 0. The number of channels is always that of the encoder. mean: [1, C], of the text; None: of the n
    tokens.
    """

    text: Tensor
    glyphs: Tensor
    image: Tensor
    mean: Tensor | None = None


def trim(text: Tensor, text_mask: Tensor, glyphs: Tensor, glyphs_mask: Tensor, image: Tensor) -> tuple[Condition, ...]:
    """Return the conditions of each video of a batch, from the arguments of diffusers' forward. It synchronises.

    text: [B, N, C] and glyphs: [B, M, C'], with masks of 0 and 1, [B, N] and [B, M]. image: [B, K, C'']; if it is zero
    for the whole batch, there is no image. Raises ValueError for a text without valid tokens.
    """
    if not image.any():
        image = image[:, :0]
    parts = zip(text, text_mask.bool(), glyphs, glyphs_mask.bool(), image, strict=True)
    return tuple(Condition(_valid(part[0], part[1], i), part[2][part[3]], part[4]) for i, part in enumerate(parts))


def trim_as_core(text: Tensor, text_mask: Tensor | None, glyphs: Tensor, image: Tensor) -> tuple[Condition, ...]:
    """Return the conditions of each video of a batch, as core's forward reads them.

    text: [B, N, C], text_mask: [B, N], glyphs: [B, M, C'], image: [B, K, C'']. Core drops neither an image of zeros nor
    glyphs, and its mean of the text includes masked tokens. Raises ValueError for a text without valid tokens.
    """
    means = [None] * len(text) if text_mask is None else text.float().mean(dim=1, keepdim=True)
    mask = torch.ones(text.shape[:2], dtype=torch.bool) if text_mask is None else text_mask.bool()
    parts = zip(text, mask, glyphs, image, means, strict=True)
    return tuple(Condition(_valid(part[0], part[1], i), *part[2:]) for i, part in enumerate(parts))


def _valid(text: Tensor, mask: Tensor, video: int) -> Tensor:
    if not mask.any():
        raise ValueError(f"The text of video {video} has no valid token: its attention mask is all zeros.")
    return text[mask]


@dataclass(frozen=True)
class Context:
    """The encoded conditions, which are the same in all steps.

    text: [n, D], the input of the token refiner. pooled: [1, D], the embedding of the mean text token.
    others: [k + m, D], image and glyph tokens, the input of the blocks.
    """

    text: Tensor
    pooled: Tensor
    others: Tensor

    @property
    def tokens(self) -> int:
        """Number of text, image and glyph tokens in each block."""
        return len(self.text) + len(self.others)


def encode(model: torch.nn.Module, condition: Condition) -> Context:
    """Run the embedders of a HunyuanVideo15Transformer3DModel that depend only on the conditions."""
    dtype = model.x_embedder.proj.weight.dtype
    text, glyphs, image = (part.to(dtype) for part in (condition.text, condition.glyphs, condition.image))
    kinds = model.cond_type_embed.weight
    refiner = model.context_embedder
    mean = text.float().mean(dim=0, keepdim=True) if condition.mean is None else condition.mean
    others = model.image_embedder(image) + kinds[2], model.context_embedder_2(glyphs) + kinds[1]
    return Context(refiner.proj_in(text), refiner.time_text_embed.text_embedder(mean.to(dtype)), torch.cat(others))


def refine(model: torch.nn.Module, context: Context, timestep: Tensor) -> Tensor:
    """Return the text tokens of one step, [tokens, D], in diffusers' order: image, glyphs, text. timestep: [1]."""
    refiner, dtype = model.context_embedder, context.text.dtype
    embed = refiner.time_text_embed
    temb = embed.timestep_embedder(embed.time_proj(timestep).to(dtype)) + context.pooled
    text = refiner.token_refiner(context.text[None], temb)[0]
    return torch.cat([context.others, text + model.cond_type_embed.weight[0]])
