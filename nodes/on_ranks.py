"""The path that all decode nodes share."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import comfy.model_management
from torch import Tensor

from ..distributed import Cancelled
from ..distributed.vae.job import DecodeJob, WeightSource
from .groups import GroupDescription, end_neighbours, group_in_use
from .memory import limit_in_bytes, make_room, memory_limit, occupy, register, sampling_devices
from .progress import Progress
from .sources import rank_source

CHECKED_ROWS = 8
"""Every eighth row is checked for NaN and infinite pixels, because the decoder spreads such values."""


@dataclass(frozen=True)
class DecodeOptions:
    """The inputs of a decode node. Raises ValueError for invalid values.

    group: None for the default group. tile_size, overlap: in pixels, for tiled mode. memory: limit per rank in GiB,
    including weights; 0 for all free memory.
    """

    group: GroupDescription | None
    mode: str
    tile_size: int
    overlap: int
    memory: float = 0.0

    def __post_init__(self) -> None:
        limit_in_bytes(self.memory)
        for name in ("tile_size", "overlap"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of pixels.")


def decode_on_ranks(latent: Tensor, vae: object, options: DecodeOptions) -> Tensor:
    """Decode a LATENT's samples, [B, 32, t, H, W] in VAE space, to frames [B, T, H', W', 3] in 0..1.

    Shows progress, previews and messages on the running node. Raises ComfyUI's InterruptProcessingException if the user
    interrupts, and ValueError for input that is not HunyuanVideo-1.5's, before anything is started or unloaded.
    """
    check_tensor(latent)
    job = DecodeJob.make(
        latent,
        WeightSource.find(rank_source(check_vae(vae))),
        options.mode,
        tile_size=options.tile_size,
        overlap=options.overlap,
        memory=limit_in_bytes(options.memory),
    )
    progress = Progress()
    with group_in_use(options.group) as group:
        group.start()
        end_neighbours(group)
        occupy(group)
        limit = memory_limit(group, job.memory)
        with as_interruption():
            outputs = group.run(
                job if limit is None else job.limited(limit),
                progress=progress.update,
                cancelled=comfy.model_management.processing_interrupted,
                started=lambda outputs: progress.watch(outputs["frames"]),
                notice=progress.tell,
                make_room=partial(make_room, group),
            )
    frames = outputs["frames"]
    if not frames[:, :, ::CHECKED_ROWS].sum().isfinite():
        progress.tell(f"Some pixels are NaN or infinite. {group.dtype} may overflow with this latent: try float32.")
    return frames


@contextlib.contextmanager
def as_interruption() -> Iterator[None]:
    """Raise ComfyUI's InterruptProcessingException for a job that was cancelled."""
    try:
        yield
    except Cancelled:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException() from None


def preload(vae: object, description: GroupDescription | None) -> None:
    """Load the VAE on the ranks in the background. Raises ValueError for a VAE of another model."""
    source = rank_source(check_vae(vae))
    with group_in_use(description) as group:
        register(group)
        group.preload(source, sampling_devices(group))


def check_tensor(latent: object) -> None:
    """Raise ValueError for samples that are not a floating-point tensor."""
    if not isinstance(latent, Tensor) or latent.is_nested or not latent.is_floating_point():
        kind = latent.dtype if isinstance(latent, Tensor) else type(latent).__name__
        raise ValueError(f"The latent is {kind}; it must be one floating-point tensor.")


def check_vae(vae: object) -> object:
    """Return the VAE. Raises ValueError for an object without a VAE model; weights are checked later, key by key."""
    if vae is None or getattr(vae, "first_stage_model", None) is None:
        raise ValueError("The VAE input contains no VAE. Check that the checkpoint it is loaded from includes one.")
    return vae
