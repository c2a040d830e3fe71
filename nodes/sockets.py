"""Socket types of this pack, their values, and the category of its nodes."""

from dataclasses import dataclass

from comfy_api.latest import io
from torch import Tensor

from .memory import LIMIT_MOST

CATEGORY = "HunyuanVideo 1.5"

Pipeline = io.Custom("HV15_PIPELINE")
Conditioning = io.Custom("HV15_CONDITIONING")
RankGroup = io.Custom("HV15_RANK_GROUP")


@dataclass(frozen=True)
class TextConditioning:
    """Both prompts, encoded by both text encoders: embeddings [1, tokens, width] and masks [1, tokens], on the CPU.

    `positive` and `negative` are keyword arguments of diffusers' pipelines.
    """

    positive: dict[str, Tensor]
    negative: dict[str, Tensor]


def searchable(schema: io.Schema, *aliases: str) -> io.Schema:
    """Return the schema with aliases for the node search. They are set as an attribute, as ComfyUI 0.3.75 requires."""
    schema.search_aliases = ["hunyuanvideo", "hunyuan video", "hv15", *aliases]
    return schema


def advanced(widget: io.WidgetInput) -> io.WidgetInput:
    """Return the input, marked as advanced. This is set as an attribute, as ComfyUI 0.3.75 requires."""
    widget.advanced = True
    return widget


def rank_group_input() -> io.Input:
    """Return the optional input for a rank group of the nodes that always use ranks."""
    return RankGroup.Input(
        "rank_group",
        optional=True,
        tooltip="From Rank Group. If unconnected, every local accelerator is used, or two CPU ranks if there is none.",
    )


def memory_input() -> io.Input:
    """Return the optional input for a memory limit."""
    return advanced(
        io.Float.Input(
            "memory",
            optional=True,
            default=0.0,
            min=0.0,
            max=float(LIMIT_MOST),
            step=0.5,
            tooltip="Memory limit per rank in GiB, including weights. 0: use all free memory. Low limits are slower.",
        )
    )
