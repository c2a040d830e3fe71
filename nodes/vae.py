"""Load HunyuanVideo-1.5 VAE: the VAE as ComfyUI's own VAE object, from either layout and at any width."""

import logging
from collections.abc import Mapping
from pathlib import Path

import comfy.model_patcher
import comfy.sd
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine
from comfy_api.latest import io
from torch import Tensor

from ..distributed.errors import CheckpointError
from ..distributed.vae.checkpoint import Checkpoint, all_tensors, open_checkpoint
from ..distributed.vae.hunyuanvideo15.layout import to_core
from .model_lists import vae_choices, vae_path
from .sockets import CATEGORY, searchable
from .sources import inode_of

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

LATENT_CHANNELS = 32
"""Number of latent channels by which core recognises the model."""


class HunyuanVideo15VAE(comfy.sd.VAE):
    """`comfy.sd.VAE` of a HunyuanVideo-1.5 checkpoint, with the checkpoint's widths.

    Core's constructor recognises the weights and sets every attribute, including the patcher. It assumes one set of
    widths, so the model that it creates is replaced, during construction, by core's model with the right widths.
    `source` is the file or folder, for ranks to map.
    """

    def __init__(self, checkpoint: Checkpoint, source: Path, dtype: torch.dtype | None) -> None:
        self.source, self.source_identity = source, checkpoint.identity
        self.source_inodes = {file: inode_of(file) for file in checkpoint.files}
        weights = {to_core(key): tensor for key, tensor in all_tensors(checkpoint).items()}
        with torch.device("meta"):
            self._replacement = MappedModel(checkpoint)
            super().__init__(sd=weights, dtype=dtype)
        del self._replacement
        if not getattr(self.patcher, "is_dynamic", bool)():  # a dynamic patcher converts tensors as they are used
            self.first_stage_model.to(self.vae_dtype)
        self.patcher.cached_patcher_init = (load_vae_patcher, (str(source), dtype))

    def __setattr__(self, name: str, value: object) -> None:
        if name == "first_stage_model" and "_replacement" in vars(self):
            value = self._replacement
        super().__setattr__(name, value)


class MappedModel(AutoencodingEngine):
    """Core's model with a checkpoint's widths. Weights stay mapped from the file until core uses them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = {
            "block_out_channels": list(checkpoint.block_out_channels),
            "in_channels": 3,
            "out_channels": 3,
            "num_res_blocks": checkpoint.layers_per_block,
            "ffactor_spatial": 16,
            "ffactor_temporal": 4,
            "downsample_match_channel": True,
            "upsample_match_channel": True,
            "z_channels": checkpoint.latent_channels,
        }
        refiner = "comfy.ldm.hunyuan_video.vae_refiner"
        super().__init__(
            regularizer_config={"target": "comfy.ldm.models.autoencoder.EmptyRegularizer"},
            encoder_config={"target": f"{refiner}.Encoder", "params": config},
            decoder_config={"target": f"{refiner}.Decoder", "params": config},
        )

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> object:
        """Assign the tensors without a copy. Raises CheckpointError for tensors that core's model does not have.

        Core's model may have tensors that a complete checkpoint does not have, because no layer uses them. They are set
        to zero, so that they can be moved and saved.
        """
        own = self.state_dict()
        if unknown := sorted(state_dict.keys() - own.keys()):
            raise CheckpointError(f"This ComfyUI's HunyuanVideo-1.5 VAE has no {unknown[0]}. Update the node pack.")
        unused = {
            key: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
            for key, tensor in own.items()
            if key not in state_dict
        }
        return super().load_state_dict({**unused, **state_dict}, strict=True, assign=True)


def load_vae(path: str | Path, dtype: str = "auto") -> HunyuanVideo15VAE:
    """Return ComfyUI's VAE for a checkpoint of either layout. dtype: "auto" (core's choice) or one of DTYPES.

    Raises CheckpointError if it is not a complete HunyuanVideo-1.5 VAE.
    """
    checkpoint = open_checkpoint(path, encoder=True)
    if checkpoint.latent_channels != LATENT_CHANNELS:
        raise CheckpointError(
            f"{Path(path).name} has {checkpoint.latent_channels} latent channels; "
            f"HunyuanVideo-1.5 has {LATENT_CHANNELS}."
        )
    log.info("%s: HunyuanVideo-1.5 VAE in %s layout, %s.", Path(path).name, checkpoint.layout, checkpoint.dtype)
    return HunyuanVideo15VAE(checkpoint, Path(path), DTYPES.get(dtype))


def load_vae_patcher(
    path: str, dtype: torch.dtype | None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """Load the weights again and return their patcher. Core calls this to put the VAE on another device."""
    return HunyuanVideo15VAE(open_checkpoint(path, encoder=True), Path(path), dtype).patcher


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return searchable(
            io.Schema(
                node_id="HV15LoadVAE",
                display_name="Load HunyuanVideo-1.5 VAE",
                category=CATEGORY,
                description="Loads the HunyuanVideo-1.5 VAE from a single file (ComfyUI's or diffusers' layout) or a "
                "diffusers folder. Files of other models and incomplete files are refused.",
                inputs=[
                    io.Combo.Input(
                        "vae_name",
                        options=vae_choices(),
                        tooltip="A file in models/vae or a folder in models/diffusers.",
                    ),
                    io.Combo.Input(
                        "dtype",
                        options=["auto", *DTYPES],
                        tooltip="Precision of ComfyUI's own encoding and decoding. Rank Group sets that of the ranks.",
                    ),
                ],
                outputs=[io.Vae.Output(tooltip="For any node that takes a VAE.")],
            ),
            "vae loader",
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str, dtype: str) -> str:
        """Return the file's identity, so that a changed file is loaded again."""
        return open_checkpoint(vae_path(vae_name)).identity

    @classmethod
    def execute(cls, vae_name: str, dtype: str) -> io.NodeOutput:
        return io.NodeOutput(load_vae(vae_path(vae_name), dtype))
