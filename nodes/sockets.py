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


def searchable(schema: io.Schema, *aliases: str) -> io.Schema:
    """The schema with words by which the node search finds it. ComfyUI 0.3.75 takes them as an attribute only."""
    schema.search_aliases = ["hunyuanvideo", "hunyuan video", "hv15", *aliases]
    return schema


def advanced(widget: io.WidgetInput) -> io.WidgetInput:
    """The input, among the advanced ones where ComfyUI shows such. ComfyUI 0.3.75 takes this as an attribute only."""
    widget.advanced = True
    return widget
