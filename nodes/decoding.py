"""Distributed VAE Decode, and the inputs that it shares with Distribute VAE."""

from comfy_api.latest import io

from ..distributed.vae.job import MODES
from .groups import GroupDescription
from .on_ranks import DecodeOptions, decode_on_ranks, preload
from .sockets import CATEGORY, advanced, memory_input, rank_group_input, searchable


def decode_inputs() -> list:
    """The inputs that the decode nodes share."""
    return [
        rank_group_input(),
        io.Combo.Input(
            "mode",
            options=list(MODES),
            tooltip="seamless: the exact untiled decode, divided between ranks. tiled: overlapping tiles, blended; "
            "the same bits for any number of ranks.",
        ),
        advanced(
            io.Int.Input(
                "tile_size", default=256, min=32, max=4096, step=16, tooltip="Tile size in pixels (tiled mode only)."
            )
        ),
        advanced(
            io.Int.Input(
                "overlap",
                default=64,
                min=0,
                max=2048,
                step=16,
                tooltip="Overlap of neighbouring tiles in pixels (tiled mode only).",
            )
        ),
        memory_input(),
    ]


class DistributedVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return searchable(
            io.Schema(
                node_id="HV15DistributedVAEDecode",
                display_name="Distributed VAE Decode",
                category=CATEGORY,
                description="Decodes a HunyuanVideo-1.5 latent on a group of ranks.",
                inputs=[
                    io.Latent.Input(
                        "samples", lazy=True, tooltip="From any HunyuanVideo-1.5 sampler, this pack's or ComfyUI's."
                    ),
                    io.Vae.Input("vae", tooltip="HunyuanVideo-1.5 VAE, from any loader."),
                    *decode_inputs(),
                ],
                outputs=[io.Image.Output(tooltip="The video frames.")],
            ),
            "vae decode",
            "multi gpu",
            "parallel",
            "tiled decode",
        )

    @classmethod
    def check_lazy_status(
        cls, vae: object, samples: dict | None = None, rank_group: GroupDescription | None = None, **_: object
    ) -> list[str]:
        """Start the ranks and load the weights while the sampler runs. ComfyUI calls this before a latent exists."""
        if samples is None:
            preload(vae, rank_group)
        return ["samples"]

    @classmethod
    def execute(
        cls, samples: dict, vae: object, rank_group: GroupDescription | None = None, **options: object
    ) -> io.NodeOutput:
        frames = decode_on_ranks(samples["samples"], vae, DecodeOptions(rank_group, **options))
        return io.NodeOutput(frames.flatten(0, 1))
