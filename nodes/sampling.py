"""Sampling with diffusers' own pipelines, watched step by step.

The pipelines have no step callback, but they call their scheduler once a step, so a scheduler that reports is enough.
The latents stay the pipeline's. The pipeline that was loaded is shared and never changed: each run makes a shell of its
own around the same parts, with its own scheduler and guider, and with the transformer's fast forward.
"""

import contextlib
from collections.abc import Callable

import comfy.latent_formats
import comfy.model_management
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..distributed.vae.job import TEMPORAL
from ..distributed.vae.tiling import SPATIAL
from . import sockets
from .denoising import transformer_on_ranks
from .groups import GroupDescription
from .loading import LoadedPipeline
from .progress import Progress
from .sockets import CATEGORY, TextConditioning, searchable


def check_size(width: int, height: int, frames: int) -> None:
    """Raise ValueError, with the nearest valid sizes, for sizes that the model cannot take."""
    for name, value in (("width", width), ("height", height)):
        if value < SPATIAL or value % SPATIAL:
            below, above = max(SPATIAL, value // SPATIAL * SPATIAL), max(SPATIAL, -(-value // SPATIAL) * SPATIAL)
            nearest = str(below) if below == above else f"{below} or {above}"
            raise ValueError(f"{name} is {value}; it must be a multiple of {SPATIAL}. Try {nearest}.")
    if frames < 1 or (frames - 1) % TEMPORAL:
        below = max(1, (frames - 1) // TEMPORAL * TEMPORAL + 1)
        raise ValueError(f"frames is {frames}; it must be {TEMPORAL}n + 1. Try {below} or {below + TEMPORAL}.")


def working_memory(transformer: torch.nn.Module, width: int, height: int, frames: int) -> int:
    """Estimate the bytes of the transformer's activations: the tensors of a block at its peak, over all tokens."""
    config = transformer.config
    tokens = ((frames - 1) // TEMPORAL + 1) * (height // SPATIAL) * (width // SPATIAL) // config.patch_size**2
    inner = config.num_attention_heads * config.attention_head_dim
    return int(tokens * inner * (8 + 2 * config.mlp_ratio) * transformer.dtype.itemsize)


@torch.inference_mode()
def sample(
    loaded: LoadedPipeline,
    conditioning: TextConditioning,
    width: int,
    height: int,
    frames: int,
    steps: int,
    guidance: float,
    shift: float,
    seed: int,
    start_image: Tensor | None = None,
    rank_group: GroupDescription | None = None,
    on_step: Callable[[Tensor], None] = lambda expected: None,
    on_block: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] = lambda message: None,
) -> Tensor:
    """Return latents [1, 32, t, height / 16, width / 16] in VAE space, float32 on the CPU.

    They are those of the diffusers pipeline with output_type "latent" up to rounding, divided by the scaling factor.
    start_image is an IMAGE, of which only the first picture is used. With a rank_group the transformer runs on its
    ranks. on_block is called between the transformer's blocks with the number of blocks done and of all, of a forward
    or, on ranks, of a step; what it raises ends the sampling. notice is called with sentences for the user. Raises
    ValueError for sizes and images that the model cannot take, and for a guider that ranks do not support.
    """
    from ..distributed.denoise.loading import streamed_bytes
    from ..distributed.denoise.module import fast_module  # diffusers, which other nodes do without
    from .pipeline_parts import FixedSizeProcessor, ReportingScheduler, changes_transformer

    check_size(width, height, frames)
    if loaded.takes_image and start_image is None:
        raise ValueError("This checkpoint is for image-to-video: connect start_image, or load a text-to-video one.")
    if start_image is not None and not loaded.takes_image:
        raise ValueError(
            "This checkpoint is for text-to-video and takes no start_image: disconnect it, or load an "
            "image-to-video checkpoint."
        )
    original = loaded.pipeline
    pipeline = loaded.call_class()(
        **{
            **original.components,
            "scheduler": ReportingScheduler.from_config(original.scheduler.config, shift=shift),
            "guider": original.guider.new(guidance_scale=guidance),
        }
    )
    own_forward = changes_transformer(pipeline.guider)
    if rank_group is not None and own_forward:
        raise ValueError(
            f"This checkpoint's guider is {type(pipeline.guider).__name__}, which changes the transformer's layers. "
            "Ranks support guiders that only combine predictions, such as ClassifierFreeGuidance."
        )
    pipeline.scheduler.on_step = on_step
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict = {"width": width, "height": height}
    if start_image is not None:
        pipeline.video_processor = FixedSizeProcessor.from_config(original.video_processor.config)
        pipeline.video_processor.size = (height, width)
        pixels = (start_image[0, ..., :3].clamp(0, 1) * 255).round().to(torch.uint8)
        arguments = {"image": Image.fromarray(pixels.cpu().numpy())}
    texts = {k: t.to(loaded.device) for k, t in {**conditioning.positive, **conditioning.negative}.items()}
    encoders = ("vae", "image_encoder") if loaded.takes_image else ()
    with contextlib.ExitStack() as stack:
        if rank_group is not None:
            pipeline.transformer = stack.enter_context(
                transformer_on_ranks(loaded, pipeline.guider, rank_group, steps, on_block or (lambda *_: None), notice)
            )
            if encoders:
                stack.enter_context(loaded.on_device(*encoders))
        else:
            memory = working_memory(original.transformer, width, height, frames)
            if loaded.streams_transformer:
                memory += streamed_bytes(original.transformer)
            stack.enter_context(loaded.on_device("transformer", *encoders, working_memory=memory))
            if not own_forward:
                stream_to = loaded.device if loaded.streams_transformer else None
                pipeline.transformer = shell = fast_module(original.transformer, on_block, stream_to)
                # diffusers' hooks make a reference cycle with the shell, so its device memory is freed here.
                stack.callback(delattr, shell, "forward")
        latents = pipeline(
            **texts,
            **arguments,
            num_frames=frames,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
        ).frames
    return latents.float().cpu() / original.vae.config.scaling_factor


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return searchable(
            io.Schema(
                node_id="HV15Sampler",
                display_name="HunyuanVideo-1.5 Sampler",
                category=CATEGORY,
                description="Samples a video latent from text, or from text and a first frame.",
                inputs=[
                    sockets.Pipeline.Input("pipeline", tooltip="From Load HunyuanVideo-1.5."),
                    sockets.Conditioning.Input("conditioning", tooltip="From HunyuanVideo-1.5 Text Encode."),
                    io.Int.Input(
                        "width", default=848, min=16, max=8192, step=16, tooltip="Width in pixels, a multiple of 16."
                    ),
                    io.Int.Input(
                        "height", default=480, min=16, max=8192, step=16, tooltip="Height in pixels, a multiple of 16."
                    ),
                    io.Int.Input(
                        "frames", default=121, min=1, max=1025, step=4, tooltip="4n + 1 frames: 5, 9, ..., 121."
                    ),
                    io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Number of denoising steps."),
                    io.Float.Input(
                        "guidance",
                        default=6.0,
                        min=0.0,
                        max=30.0,
                        step=0.1,
                        tooltip="Scale of classifier-free guidance. 1: no guidance, in half the time.",
                    ),
                    io.Float.Input(
                        "shift",
                        default=5.0,
                        min=0.1,
                        max=100.0,
                        step=0.1,
                        tooltip="Timestep shift of the flow-matching schedule.",
                    ),
                    io.Int.Input(
                        "seed",
                        default=0,
                        min=0,
                        max=2**63 - 1,
                        control_after_generate=True,
                        tooltip="Random seed of the initial noise.",
                    ),
                    io.Image.Input(
                        "start_image",
                        optional=True,
                        tooltip="First frame of the video (image-to-video checkpoints only).",
                    ),
                    sockets.RankGroup.Input(
                        "rank_group",
                        optional=True,
                        tooltip="From Rank Group. If connected, denoising runs on its ranks; otherwise it runs in "
                        "ComfyUI's process.",
                    ),
                ],
                outputs=[io.Latent.Output(tooltip="The video latent, for any node that decodes.")],
            ),
            "sampler",
            "ksampler",
            "multi gpu",
            "parallel",
        )

    @classmethod
    def execute(cls, pipeline: LoadedPipeline, conditioning: TextConditioning, **options: object) -> io.NodeOutput:
        on_ranks, taken = options.get("rank_group") is not None, 0
        bar = comfy.utils.ProgressBar(options["steps"])
        previewer = latent_preview.get_previewer(pipeline.device, comfy.latent_formats.HunyuanVideo15())
        scale = pipeline.pipeline.vae.config.scaling_factor

        def on_step(expected: Tensor) -> None:
            nonlocal taken
            comfy.model_management.throw_exception_if_processing_interrupted()
            picture = previewer and previewer.decode_latent_to_preview_image("JPEG", expected.float() / scale)
            taken += 1
            bar.update_absolute(taken, preview=picture or None)

        def on_block(done: int, blocks: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if on_ranks and 0 < done < blocks:
                bar.update_absolute(taken + done / blocks)

        comfy.model_management.throw_exception_if_processing_interrupted()
        watching = {"on_step": on_step, "on_block": on_block, "notice": Progress().tell}
        return io.NodeOutput({"samples": sample(pipeline, conditioning, **options, **watching)})
