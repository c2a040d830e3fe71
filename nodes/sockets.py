"""The sockets that this pack adds, the category of its nodes, and what travels on the sockets."""

from dataclasses import dataclass

from comfy_api.latest import io
from torch import Tensor

CATEGORY = "HunyuanVideo 1.5"

Pipeline = io.Custom("HV15_PIPELINE")
Conditioning = io.Custom("HV15_CONDITIONING")
RankGroup = io.Custom("HV15_RANK_GROUP")


@dataclass(frozen=True)
class TextConditioning:
    """Both prompts through both text encoders, on the CPU: embeddings [1, tokens, width] and masks [1, tokens].

    Each of `positive` and `negative` holds the keyword arguments that diffusers' pipelines take for it.
    """

    positive: dict[str, Tensor]
    negative: dict[str, Tensor]
