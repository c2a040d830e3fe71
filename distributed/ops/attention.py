"""The decoder's one attention: every position of a frame attends to all positions of its own and earlier frames.

diffusers writes this as one attention with a dense frame-causal mask. Taken frame by frame it needs no mask: the
queries of frame f against the keys of frames 0..f. Keys and values are kept, in time order, so that a later chunk
finds those of earlier ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SCORE_BYTES = 256 * 2**20
"""Size limit of one block of scores; queries are taken in blocks so that scores never need more."""


def forms_scores(device: torch.device) -> bool:
    """Whether attention is two matrix products with scores between them on this device, and not the library's own."""
    return device.type == "cuda"


def score_bytes(device: torch.device, queries: int, keys: int) -> int:
    """Bytes that `KeyValues.attend` needs for its scores: float32, their softmax, and that rounded."""
    return 5 * min(SCORE_BYTES, 4 * queries * keys) // 2 if forms_scores(device) else 0


class KeyValues:
    """Keys and values of all frames so far: two tensors [time * positions, C], filled from the front."""

    def __init__(self, time: int, positions: int, channels: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.empty(time * positions, channels, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.positions = positions
        self.frames = 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take one frame's keys and values, [positions, C] each, in whatever order of positions: attention has none."""
        start = self.frames * self.positions
        self.keys[start : start + self.positions] = keys
        self.values[start : start + self.positions] = values
        self.frames += 1

    def attend(self, queries: Tensor) -> Tensor:
        """Attention of one frame's queries, [q, C], to every frame so far. Returns [q, C]."""
        length = self.frames * self.positions
        keys, values = self.keys[:length], self.values[:length]
        if not forms_scores(queries.device):
            return F.scaled_dot_product_attention(queries[None, None], keys[None, None], values[None, None])[0, 0]
        # One head of 1024 channels: too wide for fused kernels, so two matrix products with a softmax between.
        block = max(1, SCORE_BYTES // (4 * length))
        return torch.cat([_attend_block(part, keys, values) for part in queries.split(block)])


def _attend_block(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    queries = queries * queries.shape[-1] ** -0.5
    if queries.dtype == torch.float32:
        return torch.softmax(queries @ keys.T, dim=-1) @ values
    # Scores stay float32: rounding them to 8 bits would be the decode's largest error.
    scores = torch.mm(queries, keys.T, out_dtype=torch.float32)
    return torch.softmax(scores, dim=-1).to(values.dtype) @ values
