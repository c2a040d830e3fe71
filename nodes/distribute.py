"""Distribute VAE: takes ComfyUI's VAE object and returns one that decodes on a rank group."""

from dataclasses import replace

import comfy.sd
from comfy_api.latest import io
from torch import Tensor

from .decoding import decode_inputs
from .groups import GroupDescription
from .on_ranks import DecodeOptions, decode_on_ranks, preload
from .sockets import CATEGORY, searchable


class DistributedVAE:
    """Mixin whose `decode` and `decode_tiled` run on ranks. See `distributed`."""

    options: DecodeOptions

    def decode(self, samples_in: Tensor, vae_options: dict | None = None) -> Tensor:
        """Decode [B, 32, t, H, W] to [B, T, H', W', 3] in 0..1, as core's `VAE.decode` does."""
        return decode_on_ranks(samples_in, self, self.options)

    def decode_tiled(
        self,
        samples: Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> Tensor:
        """Decode in tiled mode, whatever the node's mode is.

        Tile size and overlap are in latent positions, as in core. tile_t and overlap_t are ignored: the decoder needs
        no tiles in time.
        """
        scale = self.spacial_compression_decode()
        sides = [side for side in (tile_x, tile_y) if side is not None]
        tile_size = min(sides) * scale if sides else self.options.tile_size
        shared = overlap * scale if overlap is not None else min(self.options.overlap, tile_size // 4 // scale * scale)
        return decode_on_ranks(samples, self, replace(self.options, mode="tiled", tile_size=tile_size, overlap=shared))


OWN = ("decode", "decode_tiled")


def distributed(vae: comfy.sd.VAE, options: DecodeOptions) -> comfy.sd.VAE:
    """Return a VAE that equals the given one in everything but decoding, which runs on ranks.

    Its class is derived from the VAE's class, and it shares the VAE's attributes. Encoding, sizes, weights and memory
    management stay those of core or of another node pack, and the model is not loaded onto ComfyUI's device for a
    decode on ranks. Attributes `decode` and `decode_tiled` of the instance are not copied: they would shadow the
    methods that run on ranks.
    """
    kind = type(vae)
    if not issubclass(kind, DistributedVAE):
        kind = type("DistributedVAE", (DistributedVAE, kind), {})
    twin = object.__new__(kind)
    twin.__dict__.update({name: value for name, value in vars(vae).items() if name not in OWN})
    twin.options = options
    return twin


class DistributeVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return searchable(
            io.Schema(
                node_id="HV15DistributeVAE",
                display_name="Distribute VAE",
                category=CATEGORY,
                description="Makes every node that decodes with this VAE decode on a group of ranks. Encoding does not "
                "change. For more than one frame ComfyUI's own decoder differs slightly from the model's definition; "
                "the ranks follow the definition.",
                inputs=[io.Vae.Input("vae", tooltip="HunyuanVideo-1.5 VAE, from any loader."), *decode_inputs()],
                outputs=[io.Vae.Output(tooltip="The same VAE, decoding on ranks.")],
            ),
            "vae decode",
            "multi gpu",
            "parallel",
        )

    @classmethod
    def execute(cls, vae: object, rank_group: GroupDescription | None = None, **options: object) -> io.NodeOutput:
        chosen = DecodeOptions(rank_group, **options)
        preload(vae, rank_group)
        return io.NodeOutput(distributed(vae, chosen))
