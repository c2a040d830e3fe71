"""The decoder's attention: every position of a frame attends to all positions of its own and earlier frames.

diffusers computes it in one call with a dense frame-causal mask. Computed frame by frame it needs no mask: the queries
of frame f attend to the keys of frames 0..f. Keys and values are stored, in time order, for later chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ranks.devices import Device

SCORE_BYTES = 256 * 2**20
"""Maximum size in bytes of the attention scores. Queries are processed in blocks of this size."""


def score_bytes(device: torch.device, queries: int, keys: int) -> int:
    """Return the bytes that `KeyValues.attend` needs for scores: float32, their softmax, and the rounded softmax."""
    return 5 * min(SCORE_BYTES, 4 * queries * keys) // 2 if Device(device).forms_attention_scores else 0


class KeyValues:
    """Keys and values of all frames so far: two tensors [time * positions, C], filled in order."""

    def __init__(self, time: int, positions: int, channels: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.empty(time * positions, channels, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.positions = positions
        self.frames = 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append one frame's keys and values, [positions, C] each. Positions may be in any order."""
        start = self.frames * self.positions
        self.keys[start : start + self.positions] = keys
        self.values[start : start + self.positions] = values
        self.frames += 1

    def attend(self, queries: Tensor) -> Tensor:
        """Return the attention of one frame's queries, [q, C], to every frame so far: [q, C]."""
        length = self.frames * self.positions
        keys, values = self.keys[:length], self.values[:length]
        if not Device(queries.device).forms_attention_scores:
            return F.scaled_dot_product_attention(queries[None, None], keys[None, None], values[None, None])[0, 0]
        # One head of 1024 channels is too wide for fused kernels: use two matrix products with a softmax in between.
        block = max(1, SCORE_BYTES // (4 * length))
        return torch.cat([_attend_block(some, keys, values) for some in queries.split(block)])


def _attend_block(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    queries = queries * queries.shape[-1] ** -0.5
    if queries.dtype == torch.float32:
        return torch.softmax(queries @ keys.T, dim=-1) @ values
    # Scores stay float32: rounding them to bfloat16's 8 bits would be the decode's largest error.
    scores = torch.mm(queries, keys.T, out_dtype=torch.float32)
    return torch.softmax(scores, dim=-1).to(values.dtype) @ values
