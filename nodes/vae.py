"""HunyuanVideo-1.5's VAE as ComfyUI's own VAE object, from either layout and at any width."""

import logging
import math
import threading
import weakref
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import folder_paths
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine
from comfy_api.latest import io

from ..distributed.errors import CheckpointError
from ..distributed.vae.checkpoint import Checkpoint, all_tensors, open_checkpoint
from ..distributed.vae.handover import SharedWeights, check_state_dict, fingerprint
from ..distributed.vae.hunyuanvideo15.layout import to_core
from .sockets import CATEGORY
from .tiny import TINY, ensure_tiny

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class HunyuanVideo15VAE(comfy.sd.VAE):
    """What `comfy.sd.VAE` makes of a HunyuanVideo-1.5 checkpoint, with widths read off the checkpoint.

    Core recognises one layout and takes one set of widths for granted; everything that it does afterwards is its own.
    `source` is the file or folder, for ranks to map.
    """

    def __init__(self, checkpoint: Checkpoint, source: Path, dtype: torch.dtype | None) -> None:
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
        # Core's own constructor, given its smallest model, sets whatever attributes this version of core has.
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)})
        self.source, self.source_identity = source, checkpoint.identity
        self.source_inodes = {file: _inode(file) for file in checkpoint.files}
        self.latent_channels, self.latent_dim, self.output_channels = checkpoint.latent_channels, 3, 3
        self.upscale_ratio = (lambda t: max(0, t * 4 - 3), 16, 16)
        self.upscale_index_formula = (4, 16, 16)
        self.downscale_ratio = (lambda t: max(0, math.floor((t + 3) / 4)), 16, 16)
        self.downscale_index_formula = (4, 16, 16)
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: torch.clamp((image + 1.0) / 2.0, min=0.0, max=1.0)
        self.working_dtypes = [torch.float16, torch.bfloat16, torch.float32]
        self.not_video = self.disable_offload = False
        self.crop_input, self.extra_1d_channel, self.size = True, None, None
        self.memory_used_encode = lambda shape, dtype: 1400 * 9 * shape[-2] * shape[-1] * dtype.itemsize
        self.memory_used_decode = lambda shape, dtype: 2800 * 4 * shape[-2] * shape[-1] * 256 * dtype.itemsize
        refiner = "comfy.ldm.hunyuan_video.vae_refiner"
        with torch.device("meta"):
            self.first_stage_model = AutoencodingEngine(
                regularizer_config={"target": "comfy.ldm.models.autoencoder.EmptyRegularizer"},
                encoder_config={"target": f"{refiner}.Encoder", "params": config},
                decoder_config={"target": f"{refiner}.Decoder", "params": config},
            ).eval()
        weights = {to_core(key): tensor for key, tensor in all_tensors(checkpoint).items()}
        # The tensors stay mapped from the file: what ranks decode is never read here.
        self.first_stage_model.load_state_dict(weights, strict=True, assign=True)
        self.device = comfy.model_management.vae_device()
        self.vae_dtype = dtype or comfy.model_management.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model.to(self.vae_dtype)
        self.output_device = comfy.model_management.intermediate_device()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model,
            load_device=self.device,
            offload_device=comfy.model_management.vae_offload_device(),
        )
        self.model_size()


def load_vae(path: str | Path, dtype: str = "auto") -> HunyuanVideo15VAE:
    """ComfyUI's VAE for a checkpoint of either layout. dtype: "auto" (core's choice) or one of DTYPES.

    Raises CheckpointError for what is not a complete HunyuanVideo-1.5 VAE.
    """
    checkpoint = open_checkpoint(path, encoder=True)
    log.info("%s: HunyuanVideo-1.5 VAE in %s layout, %s.", Path(path).name, checkpoint.layout, checkpoint.dtype)
    return HunyuanVideo15VAE(checkpoint, Path(path), DTYPES.get(dtype))


def _inode(file: Path) -> tuple[int, int] | None:
    """What stays the same where a file is written over, and does not where another takes its place."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def rank_source(vae: comfy.sd.VAE) -> Path:
    """The file or folder that ranks map: the VAE's checkpoint, or where that is not known, its weights handed over.

    Weights in memory are written once, for all groups, until they change or their model is gone. Raises
    CheckpointError for a VAE that is not HunyuanVideo-1.5's, that was not loaded whole, or whose file was written over.
    """
    source = getattr(vae, "source", None)
    if source is not None:
        try:
            if open_checkpoint(source).identity == vae.source_identity:
                return source
        except (CheckpointError, OSError):
            pass  # the file is gone or another by now
        overwritten = [file.name for file, inode in vae.source_inodes.items() if _inode(file) == inode]
        if overwritten:  # its weights are mapped: to read them now could end this process
            raise CheckpointError(f"{overwritten[0]} was written over while it was loaded. Queue the prompt again.")
        # Where it was taken away, or replaced as downloads are, the VAE still has its weights.
    model = vae.first_stage_model
    weights = vae.get_sd()
    layout = check_state_dict(weights)
    with _lock:
        mark = fingerprint(weights)
        handed = _handed.get(model)
        if handed is None or handed.mark != mark:
            log.info("Handing a HunyuanVideo-1.5 VAE in memory (%s layout) over to the ranks.", layout)
            handed = None
            _handed.pop(model, None)  # the file of the weights before goes before the next is written
            handed = _handed[model] = SharedWeights(weights, mark)
        return handed.path


_lock = threading.Lock()
_handed: "weakref.WeakKeyDictionary[torch.nn.Module, SharedWeights]" = weakref.WeakKeyDictionary()


def tiny_folder(name: str) -> Path:
    """The built-in model of that name, made if need be."""
    return ensure_tiny(TINY[name], Path(folder_paths.get_user_directory()) / "hv15_tiny")


def vae_choices() -> list[str]:
    """Names for the list: the built-in model, files in models/vae, folders in models/diffusers with a VAE."""
    files = [name for name in folder_paths.get_filename_list("vae") if name.endswith(".safetensors")]
    return [next(iter(TINY)), *files, *vae_folders()]


def vae_folders() -> dict[str, Path]:
    """Folders of models/diffusers that are a VAE or, as pipelines do, have one, by their name in the list."""
    found: dict[str, Path] = {}
    for child in _diffusers_children():
        for name, folder in ((f"{child.name}/vae", child / "vae"), (child.name, child)):
            if any(folder.glob("diffusion_pytorch_model*.safetensors")):
                found.setdefault(name, folder)
    return found


def diffusers_folders() -> list[Path]:
    """Folders of models/diffusers that hold a pipeline."""
    return [child for child in _diffusers_children() if (child / "model_index.json").is_file()]


def _diffusers_children() -> list[Path]:
    parents = [Path(parent) for parent in folder_paths.get_folder_paths("diffusers")]
    return [child for parent in parents if parent.is_dir() for child in sorted(parent.iterdir())]


def vae_path(name: str) -> Path:
    """Where the VAE of that name lies."""
    if name in TINY:
        return tiny_folder(name) / "vae"
    if folder := vae_folders().get(name):
        return folder
    return Path(folder_paths.get_full_path_or_raise("vae", name))


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HV15LoadVAE",
            display_name="Load HunyuanVideo-1.5 VAE",
            category=CATEGORY,
            description="Loads HunyuanVideo-1.5's VAE from a single file (ComfyUI's or diffusers' layout) or a "
            "diffusers folder. Files of other models, and incomplete ones, are refused.",
            inputs=[
                io.Combo.Input("vae_name", options=vae_choices(), tooltip="From models/vae and models/diffusers."),
                io.Combo.Input(
                    "dtype",
                    options=["auto", *DTYPES],
                    tooltip="Precision of ComfyUI's own encoding and decoding. Ranks have a dtype of their own.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="A VAE for any node.")],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str, dtype: str) -> str:
        """A file that has changed is loaded anew."""
        return open_checkpoint(vae_path(vae_name)).identity

    @classmethod
    def execute(cls, vae_name: str, dtype: str) -> io.NodeOutput:
        return io.NodeOutput(load_vae(vae_path(vae_name), dtype))
