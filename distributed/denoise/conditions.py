"""What the transformer is conditioned on, cut to its valid tokens.

diffusers pads text to a fixed length and masks the padding in every attention. Valid tokens never read padded ones, so
without padding the function is the same, and needs no mask. How many tokens are valid is found out here, once per
prompt: later steps know it from shapes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """One video's conditions: text [n, C], glyphs [m, C'] (ByT5's text in quotes) and image [k, C''].

    glyphs and image have no tokens where there are none; each has its encoder's channels all the same.
    """

    text: Tensor
    glyphs: Tensor
    image: Tensor


def trim(text: Tensor, text_mask: Tensor, glyphs: Tensor, glyphs_mask: Tensor, image: Tensor) -> tuple[Condition, ...]:
    """The conditions of each video of a batch, from the arguments of diffusers' forward. Waits for the device.

    text: [B, N, C] and glyphs: [B, M, C'], with masks of 0 and 1, [B, N] and [B, M]. image: [B, K, C'']; where it is
    zero for the whole batch there is none. Raises ValueError for a text without a valid token.
    """
    if not image.any():
        image = image[:, :0]
    conditions = tuple(
        Condition(text_[text_mask_.bool()], glyphs_[glyphs_mask_.bool()], image_)
        for text_, text_mask_, glyphs_, glyphs_mask_, image_ in zip(
            text, text_mask, glyphs, glyphs_mask, image, strict=True
        )
    )
    for i, condition in enumerate(conditions):
        if not len(condition.text):
            raise ValueError(f"The text of video {i} has no valid token: its attention mask is all zeros.")
    return conditions


@dataclass(frozen=True)
class Context:
    """What of the conditions does not change from step to step.

    text: [n, D] that goes into the token refiner. pooled: [1, D], the whole text in one vector.
    others: [k + m, D], image and glyph tokens, ready for the blocks.
    """

    text: Tensor
    pooled: Tensor
    others: Tensor

    @property
    def tokens(self) -> int:
        """Text tokens in each block's attention."""
        return len(self.text) + len(self.others)


def encode(model: torch.nn.Module, condition: Condition) -> Context:
    """Run the embedders of a HunyuanVideo15Transformer3DModel that depend on nothing but the conditions."""
    dtype = model.x_embedder.proj.weight.dtype
    text, glyphs, image = (part.to(dtype) for part in (condition.text, condition.glyphs, condition.image))
    kinds = model.cond_type_embed.weight
    refiner = model.context_embedder
    pooled = text.float().mean(dim=0, keepdim=True).to(dtype)
    others = model.image_embedder(image) + kinds[2], model.context_embedder_2(glyphs) + kinds[1]
    return Context(refiner.proj_in(text), refiner.time_text_embed.text_embedder(pooled), torch.cat(others))


def refine(model: torch.nn.Module, context: Context, timestep: Tensor) -> Tensor:
    """The text tokens of one step, [tokens, D], in diffusers' order: image, glyphs, text. timestep: [1]."""
    refiner, dtype = model.context_embedder, context.text.dtype
    embed = refiner.time_text_embed
    temb = embed.timestep_embedder(embed.time_proj(timestep).to(dtype)) + context.pooled
    text = refiner.token_refiner(context.text[None], temb)[0]
    return torch.cat([context.others, text + model.cond_type_embed.weight[0]])
