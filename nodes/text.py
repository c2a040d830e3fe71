"""Text Encode: encodes prompts with the pipeline's two text encoders."""

import torch
from comfy_api.latest import io

from . import sockets
from .loading import LoadedPipeline
from .sockets import CATEGORY, TextConditioning, searchable

NAMES = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")


@torch.inference_mode()
def encode(loaded: LoadedPipeline, positive: str, negative: str) -> TextConditioning:
    """Encode both prompts with `encode_prompt` of the diffusers pipeline."""
    pipeline = loaded.pipeline
    with loaded.on_device("text_encoder", "text_encoder_2"):
        sides = [
            pipeline.encode_prompt(prompt=prompt, device=loaded.device, dtype=pipeline.transformer.dtype)
            for prompt in (positive, negative)
        ]
    positive_side, negative_side = (
        {name: tensor.cpu() for name, tensor in zip(NAMES, side, strict=True)} for side in sides
    )
    return TextConditioning(positive_side, {f"negative_{name}": t for name, t in negative_side.items()})


class TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return searchable(
            io.Schema(
                node_id="HV15TextEncode",
                display_name="HunyuanVideo-1.5 Text Encode",
                category=CATEGORY,
                description="Encodes a positive and a negative prompt with Qwen2.5-VL, and quoted text with "
                "ByT5, so that it can appear in the picture.",
                inputs=[
                    sockets.Pipeline.Input("pipeline", tooltip="From Load HunyuanVideo-1.5."),
                    io.String.Input(
                        "positive", multiline=True, dynamic_prompts=True, tooltip="What the video should show."
                    ),
                    io.String.Input(
                        "negative", multiline=True, dynamic_prompts=True, tooltip="What the video should not show."
                    ),
                ],
                outputs=[sockets.Conditioning.Output(display_name="conditioning", tooltip="For the Sampler.")],
            ),
            "prompt",
            "text encoder",
        )

    @classmethod
    def execute(cls, pipeline: LoadedPipeline, positive: str, negative: str) -> io.NodeOutput:
        return io.NodeOutput(encode(pipeline, positive, negative))
