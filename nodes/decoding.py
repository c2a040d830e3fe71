"""Rank Group and Distributed VAE Decode, and the one path on which any node of this pack decodes."""

import time

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ..distributed import Cancelled
from ..distributed.group import KEEP
from ..distributed.ranks.devices import COLLECTIVES
from ..distributed.vae.job import MODES, DecodeRequest, check_latent, check_request
from . import sockets
from .groups import GroupDescription, live_group, running_server
from .memory import enter, make_room
from .sockets import CATEGORY
from .vae import DTYPES, rank_source

PREVIEW_SECONDS = 1.0


def decode_on_ranks(
    latent: Tensor,
    vae: object,
    description: GroupDescription | None,
    mode: str,
    tile_size: int,
    overlap: int,
    memory: float,
) -> Tensor:
    """Decode a LATENT's samples, [B, 32, t, H, W] in VAE space, to frames [B, T, H', W', 3] in 0..1.

    memory: GiB that each rank may use, weights included; 0 for whatever is free.
    Shows progress and previews on the node that runs, and ends with ComfyUI's own interruption when interrupted.
    Raises ValueError for input that is not HunyuanVideo-1.5's, before anything is started or unloaded.
    """
    check_kind(latent)
    source = rank_source(check_vae(vae))
    check_latent(latent, vae.latent_channels)
    check_request(DecodeRequest(tuple(latent.shape), mode, tile_size, overlap), 1)
    group = live_group(description)
    group.start()
    make_room(group)
    progress = Progress()
    try:
        return group.decode(
            latent,
            source,
            mode,
            tile_size=tile_size,
            overlap=overlap,
            memory=int(memory * 2**30) or None,
            progress=progress.update,
            cancelled=comfy.model_management.processing_interrupted,
            frames_started=progress.watch,
            notice=progress.tell,
        )
    except Cancelled:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException() from None


def preload(vae: object, description: GroupDescription | None) -> None:
    """Have the ranks load the VAE in the background. Raises ValueError for one that is not HunyuanVideo-1.5's."""
    main = comfy.model_management.get_torch_device()  # the sampler needs its memory until the decode
    shared = [] if main.type == "cpu" else [str(main)]
    source, group = rank_source(check_vae(vae)), live_group(description)
    enter(group)
    group.preload(source, shared)


class Progress:
    """The node's progress bar, with one of the finished frames as its picture, about once a second."""

    def __init__(self) -> None:
        context = get_executing_context()
        self.node_id = context.node_id if context else None
        self.bar = comfy.utils.ProgressBar(100, node_id=self.node_id)
        self.frames: Tensor | None = None
        self.shown = time.monotonic()

    def watch(self, frames: Tensor) -> None:
        self.frames = frames

    def tell(self, words: str) -> None:
        """Show a sentence on the node."""
        server = running_server()
        if server and self.node_id:
            server.send_progress_text(words, self.node_id)

    def update(self, done: int, total: int) -> None:
        if not total:
            return
        preview = None
        if self.frames is not None and done > 0 and time.monotonic() - self.shown > PREVIEW_SECONDS:
            self.shown = time.monotonic()
            frames = self.frames.flatten(0, 1)
            # A little behind the newest frame: ranks are not all equally far.
            newest = max(0, min(len(frames) - 1, done * len(frames) // total - 8))
            pixels = (frames[newest].clamp(0, 1) * 255).to(torch.uint8)
            preview = ("JPEG", Image.fromarray(pixels.numpy()), 512)
        self.bar.update_absolute(100 * done // total, 100, preview)


def check_kind(latent: Tensor) -> None:
    """Refuse what is not a video latent of this model, in words for the person at the graph."""
    if not isinstance(latent, Tensor) or latent.is_nested or not latent.is_floating_point():
        kind = latent.dtype if isinstance(latent, Tensor) else type(latent).__name__
        raise ValueError(f"The latent holds {kind}; it must be one tensor of floating point numbers.")
    if latent.ndim == 4:
        raise ValueError(
            f"The latent has shape {list(latent.shape)}, that of an image model. Distributed decoding takes video "
            "latents, [batch, 32, frames, height, width], from a HunyuanVideo-1.5 sampler."
        )
    if latent.ndim != 5:
        raise ValueError(
            f"The latent has {latent.ndim} dimensions, {list(latent.shape)}; a video latent has 5: "
            "[batch, 32, frames, height, width]."
        )


def check_vae(vae: object) -> object:
    """Refuse what is plainly not a HunyuanVideo-1.5 VAE; the weights themselves are checked key by key later."""
    if vae is None or getattr(vae, "first_stage_model", None) is None:
        raise ValueError("The VAE input holds no VAE. Does the checkpoint that it comes from have one?")
    return vae


class RankGroupNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HV15RankGroup",
            display_name="Rank Group",
            category=CATEGORY,
            description="Starts one process for each device, in the background, and keeps them between prompts. "
            "Place it early: processes and weights come up while the sampler works.",
            inputs=[
                io.String.Input(
                    "devices",
                    default="auto",
                    tooltip="auto (every local accelerator, else two CPU ranks), or a list: cuda:0,cuda:1 or npu:0-3 "
                    "or cpu,cpu.",
                ),
                io.Combo.Input(
                    "backend",
                    options=["auto", *COLLECTIVES.values()],
                    tooltip="How ranks talk to each other. auto takes the device's own library.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", *DTYPES],
                    tooltip="What ranks compute in. auto: bfloat16 on accelerators, float32 on the CPU.",
                ),
                io.Combo.Input(
                    "keep_loaded",
                    options=list(KEEP),
                    tooltip="After a decode: keep the weights on the devices, release them, or stop the processes.",
                ),
                io.Int.Input(
                    "start_timeout", default=180, min=5, max=3600, tooltip="Seconds for the processes to come up."
                ),
                io.Int.Input(
                    "stall_timeout",
                    default=120,
                    min=5,
                    max=3600,
                    tooltip="Seconds without progress after which a process counts as hung and is replaced.",
                ),
            ],
            outputs=[sockets.RankGroup.Output(display_name="rank_group", tooltip="For the decode nodes.")],
        )

    @classmethod
    def execute(cls, **options: object) -> io.NodeOutput:
        description = GroupDescription(**options)
        live_group(description).start()
        return io.NodeOutput(description)


def decode_inputs() -> list:
    """The inputs that the decode nodes share."""
    return [
        sockets.RankGroup.Input(
            "rank_group", optional=True, tooltip="From Rank Group. Without it, every local accelerator is used."
        ),
        io.Combo.Input(
            "mode",
            options=list(MODES),
            tooltip="seamless: the exact untiled decode, divided between ranks. tiled: overlapping tiles, blended; "
            "the same bits whatever the number of ranks.",
        ),
        io.Int.Input("tile_size", default=256, min=32, max=4096, step=16, tooltip="Pixels; counts in tiled mode."),
        io.Int.Input(
            "overlap", default=64, min=0, max=2048, step=16, tooltip="Pixels that tiles share; counts in tiled mode."
        ),
        io.Float.Input(
            "memory",
            optional=True,
            default=0.0,
            min=0.0,
            max=4096.0,
            step=0.5,
            tooltip="GiB that each rank may use, weights included; 0: whatever is free. Less is slower.",
        ),
    ]


class DistributedVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HV15DistributedVAEDecode",
            display_name="Distributed VAE Decode",
            category=CATEGORY,
            description="Decodes a HunyuanVideo-1.5 latent on a group of ranks.",
            inputs=[
                io.Latent.Input(
                    "samples", lazy=True, tooltip="From any HunyuanVideo-1.5 sampler, this pack's or ComfyUI's."
                ),
                io.Vae.Input("vae", tooltip="HunyuanVideo-1.5's VAE, from any loader."),
                *decode_inputs(),
            ],
            outputs=[io.Image.Output(tooltip="The frames.")],
        )

    @classmethod
    def check_lazy_status(
        cls, vae: object, samples: dict | None = None, rank_group: GroupDescription | None = None, **_: object
    ) -> list[str]:
        """Asked before there is a latent: ranks come up and load the weights while the sampler works."""
        if samples is None:
            preload(vae, rank_group)
        return ["samples"]

    @classmethod
    def execute(
        cls,
        samples: dict,
        vae: object,
        rank_group: GroupDescription | None = None,
        memory: float = 0.0,
        **how: object,
    ) -> io.NodeOutput:
        frames = decode_on_ranks(samples["samples"], vae, rank_group, **how, memory=memory)
        return io.NodeOutput(frames.flatten(0, 1))
