"""Loading a diffusers pipeline, and moving its parts under ComfyUI's memory management."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import torch
from comfy_api.latest import io

from ..distributed.denoise.upload import Uploads
from ..distributed.ranks.devices import Device
from ..distributed.safetensors_files import identity_of
from . import libraries, sockets
from .model_lists import TINY, diffusers_folders, model_folder
from .pipeline_folder import PIPELINES, check_folder
from .sockets import CATEGORY, advanced, searchable
from .vae import DTYPES, load_vae

OFFLOADS = ("model", "none", "group")


class WholePatcher(comfy.model_patcher.ModelPatcher):
    """Loads a model onto the device as a whole or not at all, and keeps its weights on the host all the while.

    ComfyUI's own models can leave some layers behind and fetch them when they run; diffusers' cannot. Weights are not
    changed on the device, so nothing needs to be copied back when they leave it.
    """

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, **options: object) -> int:
        return super().partially_load(device_to, 1e32, **options)

    def partially_unload(self, *args: object, **options: object) -> int:
        return 0  # nothing freed, upon which ComfyUI unloads it as a whole

    def load(self, device_to: torch.device, *args: object, **options: object) -> None:
        if Device(device_to).has_streams:
            self.model.arrive(device_to)
        super().load(device_to, *args, **options)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            self.model.leave()
        super().unpatch_model(device_to, unpatch_weights)


class LoadedPipeline:
    """The value of an HV15_PIPELINE socket: a diffusers pipeline whose parts ComfyUI moves.

    offload: "model" puts a part on the device while it works; "none" leaves it there afterwards; "group" does as
    "model", but the transformer stays in host memory, from which its blocks are streamed. In all cases ComfyUI may
    unload parts when other models need the memory, and unloads other models for them. Without an accelerator nothing
    moves. `folder` is where ranks find the same weights.
    """

    def __init__(self, pipeline: object, offload: str, folder: Path) -> None:
        self.pipeline, self.offload, self.folder = pipeline, offload, folder
        self.device = comfy.model_management.get_torch_device()
        self.patchers = {
            name: WholePatcher(_Holder(part), self.device, comfy.model_management.unet_offload_device())
            for name, part in pipeline.components.items()
            if isinstance(part, torch.nn.Module) and not any(p.is_meta for p in part.parameters())
        }
        if offload == "group" and self.device.type != "cpu":
            from .pipeline_parts import changes_transformer  # diffusers, which other nodes do without

            del self.patchers["transformer"]
            if changes_transformer(pipeline.guider):
                stream_layers(pipeline.transformer, self.device)

    @property
    def streams_transformer(self) -> bool:
        """Whether the transformer's weights stay in host memory while it computes on the device."""
        return "transformer" not in self.patchers

    @property
    def takes_image(self) -> bool:
        """Whether the checkpoint is one for image-to-video."""
        return type(self.pipeline).__name__ == PIPELINES[1]

    @contextmanager
    def on_device(self, *names: str, working_memory: int = 0) -> Iterator[None]:
        """Load the named parts onto the device, with `working_memory` bytes beside them."""
        patchers = [self.patchers[name] for name in names if name in self.patchers]
        if not patchers:  # the part streams its weights, but its working memory must be free
            comfy.model_management.free_memory(
                max(working_memory, comfy.model_management.minimum_inference_memory()), self.device
            )
        comfy.model_management.load_models_gpu(patchers, memory_required=working_memory, force_full_load=True)
        try:
            yield
        finally:
            if self.offload != "none":
                _unload(patchers)

    def call_class(self) -> type:
        """Return the pipeline's class, changed to compute on the device even while its parts are elsewhere."""
        device = self.device
        return type(type(self.pipeline).__name__, (type(self.pipeline),), {"_execution_device": device})


class _Holder(torch.nn.Module):
    """Lets ComfyUI set `device` on a part; diffusers' own is read-only. Keeps the part's weights on the host."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part
        self.device = torch.device("cpu")
        self.host = [
            (module, name, tensor, tensor.data)
            for module in part.modules()
            for name, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        ]

    def arrive(self, device: torch.device) -> None:
        """Replace the weights by copies on the device, made as ranks make them, which is faster than `Module.to`."""
        tensors = {id(tensor): (tensor, data) for _, _, tensor, data in self.host}.values()
        with Uploads(device, self.part.dtype).transfer() as transfer:
            copies = transfer.fetch([data for _, data in tensors])()
        for (tensor, _), copied in zip(tensors, copies, strict=True):
            tensor.data = copied

    def leave(self) -> None:
        """Put the weights on the host back in their places."""
        for module, name, tensor, data in self.host:
            tensor.data = data  # if moving the module changed the tensor
            setattr(module, name, tensor)  # if it replaced the tensor by another


def stream_layers(model: torch.nn.Module, device: torch.device) -> None:
    """Make diffusers' own forward copy each layer to the device when it runs. On CUDA the next one is prefetched.

    For guiders that need this forward (see `pipeline_parts.changes_transformer`). Raises ValueError without accelerate.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError(
            "Offload group with this checkpoint's guider needs the package accelerate: install it, or choose model."
        )
    model.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")


def _unload(patchers: list[comfy.model_patcher.ModelPatcher]) -> None:
    """Unload the models from the device, and remove them from ComfyUI's list of loaded models."""
    loaded = comfy.model_management.current_loaded_models
    for entry in [entry for entry in loaded if any(entry.model is patcher for patcher in patchers)]:
        loaded.remove(entry)
        entry.model_unload()
    comfy.model_management.soft_empty_cache()


def load_pipeline(folder: Path, dtype: torch.dtype, offload: str) -> LoadedPipeline:
    """Load a diffusers folder. Raises ValueError that names the file that is missing or the class that is wrong."""
    name = check_folder(folder)
    diffusers = libraries.diffusers()
    parts = {}
    if name == PIPELINES[0]:  # text to video uses only the VAE's config, so its weights are not loaded
        with torch.device("meta"):
            parts["vae"] = diffusers.AutoencoderKLHunyuanVideo15.from_config(
                diffusers.AutoencoderKLHunyuanVideo15.load_config(folder / "vae")
            )
    options = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    pipeline = getattr(diffusers, name).from_pretrained(folder, **options, **parts)
    if name == PIPELINES[1]:
        pipeline.vae.decoder = None  # an image is only encoded; videos are decoded by other nodes
    pipeline.set_progress_bar_config(disable=True)
    return LoadedPipeline(pipeline, offload, folder)


def pipeline_dtype(choice: str) -> torch.dtype:
    """Return the dtype of a choice. auto: bfloat16, float16 on devices without bfloat16, float32 on the CPU."""
    if choice != "auto":
        return DTYPES[choice]
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float16


class LoadPipeline(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return searchable(
            io.Schema(
                node_id="HV15LoadPipeline",
                display_name="Load HunyuanVideo-1.5",
                category=CATEGORY,
                description="Loads a HunyuanVideo-1.5 pipeline in diffusers format from models/diffusers, or the "
                "built-in miniature, which needs no download.",
                inputs=[
                    io.Combo.Input(
                        "model",
                        options=[*TINY, *(folder.name for folder in diffusers_folders())],
                        tooltip="A folder of models/diffusers, such as HunyuanVideo-1.5-480p_t2v.",
                    ),
                    io.Combo.Input(
                        "dtype",
                        options=["auto", *DTYPES],
                        tooltip="Precision of all components. auto: bfloat16 on accelerators (float16 on GPUs "
                        "without bfloat16), float32 on the CPU.",
                    ),
                    advanced(
                        io.Combo.Input(
                            "offload",
                            options=list(OFFLOADS),
                            tooltip="model: each component is on the GPU only while it runs. none: components stay on "
                            "the GPU as long as there is room. group: the transformer is streamed block by block "
                            "(least memory). No effect on the CPU.",
                        )
                    ),
                ],
                outputs=[
                    sockets.Pipeline.Output(display_name="pipeline", tooltip="For Text Encode and the Sampler."),
                    io.Vae.Output(display_name="vae", tooltip="The pipeline's VAE, for any node that takes one."),
                ],
            ),
            "diffusers",
            "model loader",
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, dtype: str, offload: str) -> str:
        """Return the identity of the model's files, so that a changed model is loaded again."""
        folder = model_folder(model)
        files = (path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file())
        return identity_of(tuple(sorted(files)))

    @classmethod
    def execute(cls, model: str, dtype: str, offload: str) -> io.NodeOutput:
        folder = model_folder(model)
        pipeline = load_pipeline(folder, pipeline_dtype(dtype), offload)
        return io.NodeOutput(pipeline, load_vae(folder / "vae", dtype))
