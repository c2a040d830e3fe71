"""Forms of diffusers' layers for training: the same functions of the same weights, for batches, and faster on a GPU.

In diffusers 0.42.1 the mask of the VAE's attention fits a batch of one only, and a Python loop fills it. Here each
frame attends to itself and to the frames before it, in one call per frame, without a mask. The RMS norm reads its input
in bf16. On a GPU it is compiled together with the activation that follows, because elementwise kernels took half of the
GPU's time. The padding writes the memory format that convolutions are fastest in, and its gradient needs no atomic
additions. The transformer takes texts of different lengths in one batch: its attention masks keys only, because the
outputs of padded rows are not used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders import autoencoder_kl_hunyuanvideo15 as vae_layers
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor


def causal_attention(self: vae_layers.HunyuanVideo15AttnBlock, x: Tensor) -> Tensor:
    """Return `HunyuanVideo15AttnBlock.forward(x)`, for x [batch, channels, frames, height, width]."""
    normed = self.norm(x)
    batch, channels, frames, height, width = x.shape
    query, key, value = (
        layer(normed).permute(0, 2, 3, 4, 1).reshape(batch, 1, frames * height * width, channels)
        for layer in (self.to_q, self.to_k, self.to_v)
    )
    size, parts = height * width, []
    for frame in range(frames):
        seen = (frame + 1) * size
        now = query[:, :, frame * size : seen]
        parts.append(F.scaled_dot_product_attention(now, key[:, :, :seen], value[:, :, :seen]))
    mixed = torch.cat(parts, dim=2).reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
    return self.proj_out(mixed) + x


def rms_norm(self: vae_layers.HunyuanVideo15RMS_norm, x: Tensor) -> Tensor:
    """Return `HunyuanVideo15RMS_norm.forward(x)`, for channels in the second dimension."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp(min=1e-12)
    return x * (self.scale / length).to(x.dtype) * self.gamma.to(x.dtype)


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """Return the SiLU of the RMS norm of x over its second dimension."""
    length = x.float().square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    return F.silu(x * (x.shape[1] ** 0.5 / length).to(x.dtype) * gamma.to(x.dtype))


@cache
def compiled_norm_silu() -> Callable[[Tensor, Tensor], Tensor]:
    """Return `norm_silu` for all sizes, as one kernel on a GPU and two for its gradient."""
    return torch.compile(norm_silu, dynamic=True)


def residual_block(self: vae_layers.HunyuanVideo15ResnetBlock, x: Tensor) -> Tensor:
    """Return `HunyuanVideo15ResnetBlock.forward(x)`, for SiLU and as many channels out as in."""
    normed = compiled_norm_silu() if x.is_cuda else norm_silu
    inner = self.conv1(normed(x, self.norm1.gamma))
    return x + self.conv2(normed(inner, self.norm2.gamma))


def causal_convolution(self: vae_layers.HunyuanVideo15CausalConv3d, x: Tensor) -> Tensor:
    """Return `HunyuanVideo15CausalConv3d.forward(x)`, for kernels of 3x3x3."""
    return self.conv(CausalPadding.apply(x))


class CausalPadding(torch.autograd.Function):
    """Replicates the first frame twice before it, and the outer rows and columns once."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        padded = torch.empty(
            (batch, channels, frames + 2, height + 2, width + 2),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last_3d,
        )
        padded[:, :, 2:, 1:-1, 1:-1] = x
        padded[:, :, 2:, 1:-1, 0], padded[:, :, 2:, 1:-1, -1] = x[..., 0], x[..., -1]
        padded[:, :, 2:, 0], padded[:, :, 2:, -1] = padded[:, :, 2:, 1], padded[:, :, 2:, -2]
        padded[:, :, :2] = padded[:, :, 2:3]
        return padded

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient[:, :, 2:].clone()
        total[:, :, 0] += gradient[:, :, 0] + gradient[:, :, 1]
        total[:, :, :, 1] += total[:, :, :, 0]
        total[:, :, :, -2] += total[:, :, :, -1]
        total[..., 1] += total[..., 0]
        total[..., -2] += total[..., -1]
        return total[:, :, :, 1:-1, 1:-1]


@contextmanager
def training_forms() -> Iterator[None]:
    """Use these forms in all VAEs of diffusers' class within the context."""
    forms = {
        vae_layers.HunyuanVideo15AttnBlock: causal_attention,
        vae_layers.HunyuanVideo15RMS_norm: rms_norm,
        vae_layers.HunyuanVideo15ResnetBlock: residual_block,
        vae_layers.HunyuanVideo15CausalConv3d: causal_convolution,
    }
    originals = {kind: kind.forward for kind in forms}
    try:
        for kind, form in forms.items():
            kind.forward = form
        yield
    finally:
        for kind, original in originals.items():
            kind.forward = original


def channels_last(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model, with the weights of its convolutions in the format that `CausalPadding` gives their input."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.to(memory_format=torch.channels_last_3d)
    return model


class KeyMask:
    """The transformer's attention with a mask [batch, text tokens] of the text's valid tokens."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        def heads(layer: torch.nn.Module, x: Tensor) -> Tensor:
            return layer(x).unflatten(2, (attn.heads, -1))

        query = attn.norm_q(heads(attn.to_q, hidden_states))
        key = attn.norm_k(heads(attn.to_k, hidden_states))
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        query = torch.cat([query, attn.norm_added_q(heads(attn.add_q_proj, encoder_hidden_states))], 1)
        key = torch.cat([key, attn.norm_added_k(heads(attn.add_k_proj, encoder_hidden_states))], 1)
        value = torch.cat([heads(attn.to_v, hidden_states), heads(attn.add_v_proj, encoder_hidden_states)], 1)
        query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
        tokens = hidden_states.shape[1]
        mask = F.pad(attention_mask, (tokens, 0), value=True)[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = mixed.transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed[:, :tokens]), attn.to_add_out(mixed[:, tokens:])


def set_key_masks(model: HunyuanVideo15Transformer3DModel) -> None:
    """Have the transformer's blocks use `KeyMask`, which `velocity` needs."""
    for block in model.transformer_blocks:
        block.attn.set_processor(KeyMask())


def velocity(
    model: HunyuanVideo15Transformer3DModel,
    latents: Tensor,
    timestep: Tensor,
    text: tuple[Tensor, Tensor],
    glyphs: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
) -> Tensor:
    """Return `model.forward` for a batch of different prompts.

    latents: [batch, 65, t, h, w]. timestep: [batch], 0 to 1000. text, glyphs, image: embeddings [batch, n, width] and
    their masks [batch, n], bool. Each text has at least one valid token.
    """
    rotary = model.rope(latents)
    modulation = model.time_embed(timestep)
    hidden = model.x_embedder(latents)
    embedder, (tokens, mask) = model.context_embedder, text
    weights = mask.float()[..., None]
    pooled = (tokens * weights).sum(1) / weights.sum(1)
    refined, condition = embedder.proj_in(tokens), embedder.time_text_embed(timestep, pooled)
    for block in embedder.token_refiner.refiner_blocks:
        refined = block(refined, condition, mask[:, None, None])
    kinds = model.cond_type_embed.weight
    context = torch.cat(
        [
            model.image_embedder(image[0]) + kinds[2],
            model.context_embedder_2(glyphs[0]) + kinds[1],
            refined + kinds[0],
        ],
        dim=1,
    )
    valid = torch.cat([image[1], glyphs[1], mask], dim=1)
    for block in model.transformer_blocks:
        hidden, context = block(hidden, context, modulation, valid, rotary)
    rows = model.proj_out(model.norm_out(hidden, modulation))
    return rows.transpose(1, 2).unflatten(2, latents.shape[2:])
