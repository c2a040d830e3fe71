"""One dual-stream block: joint attention of video and text, then an MLP for each.

Each half of a block ends with a gated addition, and the next half begins with a modulated norm. `fused.add_norm` is one
pass for both, so a stream stores its tokens together with their norm.
"""

import torch
from torch import Tensor, nn

from .attention import attend
from .fused import Rotation, add_norm, linear_gelu, modulated_norm, place_heads
from .share import QUERIES, Share, Wait

MLP_TOKENS = 16_384
"""Tokens that an MLP processes at a time. Its inner tensor is at most 256 MiB in 16 bits; products are not slower."""


Norm = tuple[Tensor, Tensor]
"""Shift and scale of a modulated norm, [D] each. The scale includes the added 1."""

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Modulation of a stream in a block: shift, scale and gate of attention, then of the MLP, [D] each."""


class Stream:
    """The tokens of video or text: x, [tokens, D], and normed, the modulated norm of x for the next layer.

    norm: shift and scale of the first norm.
    """

    def __init__(self, x: Tensor, norm: Norm, eps: float) -> None:
        self.x, self.eps = x, eps
        self.normed = modulated_norm(x, *norm, eps)

    def add(self, gate: Tensor, update: Tensor, following: Norm) -> None:
        """Add gate * update to x, then compute the norm `following`. gate: [D], update: [tokens, D]."""
        add_norm(self.x, gate, update, *following, self.eps, self.normed)

    def clamp(self, following: Norm) -> None:
        """Clamp infinite float16 values, as core does with the text of each block, then compute the norm again."""
        limit = torch.finfo(torch.float16).max
        self.x.nan_to_num_(nan=0.0, posinf=limit, neginf=-limit)
        self.normed = modulated_norm(self.x, *following, self.eps)

    def mlp(self, ff: nn.Module, gate: Tensor, following: Norm) -> None:
        """Add the gated MLP of the normed tokens to x, then compute the norm `following`."""
        up, down = ff.net[0].proj, ff.net[2]
        strips = -(-len(self.x) // MLP_TOKENS) or 1
        for x, normed in zip(self.x.tensor_split(strips), self.normed.tensor_split(strips), strict=True):
            add_norm(x, gate, down(linear_gelu(normed, up)), *following, self.eps, normed)


def run_block(
    block: nn.Module,
    video: Stream,
    text: Stream,
    modulation: tuple[Six, Six],
    following: tuple[Norm, Norm | None],
    rotation: Rotation,
    share: Share,
) -> None:
    """Run a HunyuanVideo15TransformerBlock on both streams, in place. They must be normed for this block.

    modulation: of video and text. following: the norms of the next block for video and text. After the last block the
    text is not used, so its norm is None and the text is not updated.
    """
    attn, (video_norm, text_norm) = block.attn, following
    layers = (
        (attn.to_v, None, attn.add_v_proj, None),
        (attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k),
        (attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q),
    )
    joint = [
        _project_video(video.normed, *layer[:2], attn.heads, share, number, len(text.x), rotation)
        for number, layer in enumerate(layers)
    ]
    for (out, _), layer in zip(joint, layers, strict=True):
        _project_text(text.normed, *layer[2:], out[len(out) - len(text.x) :], share)
    for _, wait in joint:
        wait()
    out = attend(*(out for out, _ in reversed(joint)))
    share.release_inputs()
    del joint
    tokens = len(out) - len(text.x)
    video_out = share.gather_heads(out[:tokens])
    text_out = None if text_norm is None else share.gather_text(out[tokens:])
    del out
    _, _, gate, *norm, mlp_gate = modulation[0]
    video.add(gate, attn.to_out[0](video_out()), norm)
    del video_out
    video.mlp(block.ff, mlp_gate, video_norm)
    if text_norm is not None:
        _, _, gate, *norm, mlp_gate = modulation[1]
        text.add(gate, attn.to_add_out(text_out()), norm)
        text.mlp(block.ff_context, mlp_gate, text_norm)
        if text.x.dtype == torch.float16:
            text.clamp(text_norm)


def _project_video(
    x: Tensor,
    layer: nn.Linear,
    norm: nn.Module | None,
    heads: int,
    share: Share,
    number: int,
    text: int,
    rotation: Rotation,
) -> tuple[Tensor, Wait]:
    """Return an input of attention of this rank's heads, [tokens + text, own heads, dim], and a `Wait` for it.

    x: [own tokens, D]. number: see `Share.input`. The rows of the text are not written.
    """
    dim = layer.out_features // heads
    out = share.input(number, text, dim, x)
    if share.split.gathers:
        place = out[share.own_rows(number)]
        torch.addmm(layer.bias, x, layer.weight.t(), out=place.flatten(1))
        if norm is not None:
            _place(place, place, norm, rotation, 1)
        return out, _nothing if number == QUERIES else share.gather_rows(out)
    projected = layer(x).view(len(x), heads, dim)
    placed = torch.empty_like(projected)
    _place(projected, placed, norm, None if norm is None else rotation, share.ranks)
    return out, share.scatter_heads(placed, out[: share.total_tokens])


def _project_text(x: Tensor, layer: nn.Linear, norm: nn.Module | None, out: Tensor, share: Share) -> None:
    """Write the text's queries, keys or values of this rank's heads to `out`, [text tokens, own heads, dim]."""
    dim = out.shape[2]
    rows = slice(share.heads.start * dim, share.heads.stop * dim)
    torch.addmm(layer.bias[rows], x, layer.weight[rows].t(), out=out.view(len(x), -1))
    if norm is not None:
        _place(out, out, norm, None, 1)


def _place(x: Tensor, out: Tensor, norm: nn.Module | None, rotation: Rotation | None, ranks: int) -> None:
    weight, eps = (norm.weight, norm.eps) if norm is not None else (None, 0.0)
    place_heads(x, out, weight=weight, eps=eps, rotation=rotation, ranks=ranks)


def _nothing() -> None:
    """A `Wait` that returns at once."""
