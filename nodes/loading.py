"""Loading a diffusers pipeline, and moving its parts under ComfyUI's memory management."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import torch
from comfy_api.latest import io

from . import sockets
from .sockets import CATEGORY
from .tiny import TINY
from .vae import DTYPES, diffusers_folders, load_vae, tiny_folder

PIPELINES = ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline")
OFFLOADS = ("model", "none", "group")


class LoadedPipeline:
    """What travels on HV15_PIPELINE: a diffusers pipeline whose parts ComfyUI moves.

    offload: "model" puts a part on the device while it works, and ComfyUI may take it away when something else needs
    the room; "none" puts all parts there at once; "group" streams the transformer through the device a few layers at
    a time (diffusers' group offloading).
    """

    def __init__(self, pipeline: object, offload: str) -> None:
        self.pipeline, self.offload = pipeline, offload
        self.device = comfy.model_management.get_torch_device()
        self.patchers = {
            name: comfy.model_patcher.ModelPatcher(
                _Holder(part), self.device, comfy.model_management.unet_offload_device()
            )
            for name, part in pipeline.components.items()
            if isinstance(part, torch.nn.Module)
        }
        if offload == "group" and self.device.type != "cpu":
            pipeline.transformer.enable_group_offload(
                onload_device=self.device, offload_type="leaf_level", use_stream=self.device.type == "cuda"
            )
            del self.patchers["transformer"]

    @property
    def takes_image(self) -> bool:
        """Whether the checkpoint is one for image-to-video."""
        return type(self.pipeline).__name__ == PIPELINES[1]

    @contextmanager
    def on_device(self, *names: str) -> Iterator[None]:
        """Have the named parts on the device; with "none", all of them."""
        wanted = self.patchers if self.offload == "none" else [name for name in names if name in self.patchers]
        comfy.model_management.load_models_gpu([self.patchers[name] for name in wanted], force_full_load=True)
        yield

    def call_class(self) -> type:
        """The pipeline's class, computing on the device wherever its parts are at the moment."""
        device = self.device
        return type(type(self.pipeline).__name__, (type(self.pipeline),), {"_execution_device": device})


class _Holder(torch.nn.Module):
    """Lets ComfyUI set `device` on a part; diffusers' own is read-only."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part
        self.device = torch.device("cpu")


def load_pipeline(folder: Path, dtype: torch.dtype, offload: str) -> LoadedPipeline:
    """Load a diffusers folder. Raises ValueError that names the file that is missing or the class that is wrong."""
    import diffusers

    check_folder(folder)
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, name).from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return LoadedPipeline(pipeline, offload)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a complete HunyuanVideo-1.5 pipeline in diffusers' format."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder.name} has no model_index.json; a diffusers pipeline has one.")
    parts = json.loads(index.read_text())
    if parts.get("_class_name") not in PIPELINES:
        raise ValueError(
            f"{folder.name} holds a {parts.get('_class_name')}; this node loads {' and '.join(PIPELINES)}."
        )
    for part, value in parts.items():
        if part.startswith("_") or not isinstance(value, list) or value[0] is None:
            continue
        inside = folder / part
        if not inside.is_dir():
            raise ValueError(f"{folder.name} has no folder {part}, where its {value[1]} belongs.")
        if part in ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder"):
            for wanted in ("config.json", "*.safetensors"):
                if not list(inside.glob(wanted)):
                    raise ValueError(f"{folder.name}/{part} has no {wanted}.")


def pipeline_dtype(choice: str) -> torch.dtype:
    """The dtype of a choice; auto is bfloat16, or float32 on the CPU."""
    if choice != "auto":
        return DTYPES[choice]
    return torch.float32 if comfy.model_management.get_torch_device().type == "cpu" else torch.bfloat16


class LoadPipeline(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HV15LoadPipeline",
            display_name="Load HunyuanVideo-1.5",
            category=CATEGORY,
            description="Loads a HunyuanVideo-1.5 pipeline in diffusers format from models/diffusers, or a tiny one "
            "with random weights that needs no download.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[*TINY, *(folder.name for folder in diffusers_folders())],
                    tooltip="A folder of models/diffusers, such as HunyuanVideo-1.5-480p_t2v.",
                ),
                io.Combo.Input(
                    "dtype", options=["auto", *DTYPES], tooltip="auto: bfloat16, or float32 without an accelerator."
                ),
                io.Combo.Input(
                    "offload",
                    options=list(OFFLOADS),
                    tooltip="model: a part is on the device while it works. none: all parts stay there. group: the "
                    "transformer streams through, for little memory.",
                ),
            ],
            outputs=[
                sockets.Pipeline.Output(display_name="pipeline", tooltip="For the text encoder and the sampler."),
                io.Vae.Output(display_name="vae", tooltip="The pipeline's VAE, for any node that takes one."),
            ],
        )

    @classmethod
    def execute(cls, model: str, dtype: str, offload: str) -> io.NodeOutput:
        if model in TINY:
            folder = tiny_folder(model)
        else:
            folder = next((folder for folder in diffusers_folders() if folder.name == model), None)
            if folder is None:
                raise ValueError(f"models/diffusers has no folder {model} with a model_index.json.")
        pipeline = load_pipeline(folder, pipeline_dtype(dtype), offload)
        return io.NodeOutput(pipeline, load_vae(folder / "vae", dtype))
