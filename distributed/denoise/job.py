"""What the controller knows of a denoising step: the conditions, the request and their checks. Imports no compute."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..contents import digest, on_host
from ..jobs import Load, TensorSpec
from ..ranks.shared_memory import place_of
from .conditions import Condition, trim, trim_as_core
from .patches import Patches
from .weights import TransformerCheckpoint

KIND = "denoise"
"""How the group's status shows this kind of job."""
NOUN = "denoising step"
"""Name of a step in messages."""

PARTS = ("text", "glyphs", "image", "mean")
"""What conditions are made of, for each video: the parts of a `Condition`. The last may be absent."""

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes that a forward can be computed in."""

MOST_BRANCHES = 2


@dataclass(frozen=True, eq=False)
class Conditions:
    """What a prompt gives to all steps of a batch of videos: checked, cut to its valid tokens, on the CPU.

    `key` identifies them: equal contents have equal keys. `tensors` are, for each video i, "text.i", "glyphs.i" and
    "image.i", [tokens, width] each, and "mean.i", [1, width], if it is not that of the text; and "latents",
    [B, C, t, h, w], if there are condition channels.
    """

    key: str
    videos: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def make(
        cls,
        checkpoint: TransformerCheckpoint,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        encoder_hidden_states_2: Tensor | None = None,
        encoder_attention_mask_2: Tensor | None = None,
        image_embeds: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> "Conditions":
        """Check conditions, named as in diffusers' forward, and cut them.

        encoder_hidden_states: the text, [B, N, C], with its mask [B, N]. encoder_hidden_states_2: glyph text,
        [B, M, C'], with its mask. No mask: all tokens are valid. image_embeds: [B, K, C'']; zeros are no image.
        latents: condition channels that are the same in all steps, [B, C, t, h, w]. Raises ValueError for what does not
        fit the transformer or each other.
        """
        text, glyphs, image = _parts(checkpoint, encoder_hidden_states, encoder_hidden_states_2, image_embeds)
        text_mask = _mask("text", text, encoder_attention_mask)
        glyphs_mask = _mask("glyphs", glyphs, encoder_attention_mask_2)
        return cls._of(trim(text, text_mask, glyphs, glyphs_mask, image), latents)

    @classmethod
    def of_core(
        cls,
        checkpoint: TransformerCheckpoint,
        context: Tensor,
        attention_mask: Tensor | None = None,
        txt_byt5: Tensor | None = None,
        clip_fea: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> "Conditions":
        """Check conditions, named as in the forward of core's HunyuanVideo, and cut them as it reads them.

        context: the text, [B, N, C]. attention_mask: its mask of 0 and 1, integers, [B, N] or [1, N]. txt_byt5: glyph
        text, [B, M, C']. clip_fea: [B, K, C'']; zeros are an image, too. latents: condition channels, [B, C, t, h, w].
        Raises ValueError for what does not fit the transformer or each other, and for what core fails on: a mask beside
        glyph text or an image.
        """
        text, glyphs, image = _parts(checkpoint, context, txt_byt5, clip_fea)
        if attention_mask is not None:
            if attention_mask.is_floating_point() or not ((attention_mask == 0) | (attention_mask == 1)).all():
                raise ValueError("The text's mask does not hold integers 0 and 1; ranks take no other masks.")
            if glyphs.shape[1] or image.shape[1]:
                raise ValueError(
                    "A text with a mask cannot have glyph text or an image; ComfyUI's own model fails too."
                )
            if len(attention_mask) == 1:
                attention_mask = attention_mask.expand(len(text), *attention_mask.shape[1:])
            attention_mask = _mask("text", text, attention_mask)
        return cls._of(trim_as_core(text, attention_mask, glyphs, image), latents)

    @classmethod
    def _of(cls, videos: Sequence[Condition], latents: Tensor | None) -> "Conditions":
        parts = {f"{part}.{i}": getattr(video, part) for i, video in enumerate(videos) for part in PARTS}
        tensors = {name: on_host(part) for name, part in parts.items() if part is not None}
        if latents is not None:
            check_latents(latents, len(videos))
            tensors["latents"] = on_host(latents)
        return cls(digest(tensors), len(videos), tensors)

    @property
    def load(self) -> Load:
        """The `Load` with which ranks keep these conditions."""
        return Load(KIND, {"key": self.key, "videos": self.videos}, self.tensors)


@dataclass(frozen=True)
class DenoiseRequest:
    """The one description of a denoising step. JSON-able through `dataclasses.asdict`.

    shape is [B, t, h, w] of the latents. timesteps, timesteps_r: one for each video; timesteps_r may be empty.
    conditions: the key of each branch. memory: bytes that each rank may use, weights included (None: all that is free).
    averaged_times: whether the embeddings of both times are averaged, not added. dtype: of the computation (None: the
    group's). patches: the key of the weights' patches, or None.
    """

    shape: tuple[int, int, int, int]
    timesteps: tuple[float, ...]
    timesteps_r: tuple[float, ...]
    conditions: tuple[str, ...]
    memory: int | None = None
    averaged_times: bool = False
    dtype: str | None = None
    patches: str | None = None

    @classmethod
    def from_json(cls, value: Mapping) -> "DenoiseRequest":
        """Return the request of which `value` is the JSON form."""
        return cls(**{name: tuple(part) if isinstance(part, list) else part for name, part in value.items()})

    @property
    def tokens(self) -> int:
        """Video tokens of one forward."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True, eq=False)
class DenoiseJob:
    """One step: the transformer's forward of `latents` with each of one or two conditions. A `Job`.

    Make it with `DenoiseJob.make`. The output "rows" is [branches, B, t * h * w, C'], float32.
    """

    request: DenoiseRequest
    checkpoint: TransformerCheckpoint
    latents: Tensor
    conditions: tuple[Conditions, ...]
    patches: Patches | None = None
    kind: str = KIND
    noun: str = NOUN
    last: bool = False
    """A step is one of a series."""

    @classmethod
    def make(
        cls,
        checkpoint: TransformerCheckpoint,
        latents: Tensor,
        timestep: float | Tensor,
        conditions: Sequence[Conditions],
        timestep_r: float | Tensor | None = None,
        memory: int | None = None,
        *,
        averaged_times: bool = False,
        dtype: str | torch.dtype | None = None,
        patches: Patches | None = None,
    ) -> "DenoiseJob":
        """Check everything about a step. Raises ValueError. See `Denoiser.__call__` for the arguments."""
        check_latents(latents)
        videos, channels, *grid = latents.shape
        if not 1 <= len(conditions) <= MOST_BRANCHES:
            raise ValueError(f"A step has {len(conditions)} conditions; it takes one, or two with guidance.")
        for condition in conditions:
            if condition.videos != videos:
                raise ValueError(f"The latents are {videos} videos and their conditions are for {condition.videos}.")
            fixed = condition.tensors.get("latents")
            if fixed is not None and list(fixed.shape[2:]) != grid:
                raise ValueError(f"The condition's latents have sizes {list(fixed.shape[2:])}, the latents {grid}.")
            of_condition = 0 if fixed is None else fixed.shape[1]
            if channels + of_condition != checkpoint.architecture.in_channels:
                raise ValueError(
                    f"The latents have {channels} channels and their condition has {of_condition}; this transformer "
                    f"takes {checkpoint.architecture.in_channels} in all."
                )
        if timestep_r is not None and not checkpoint.architecture.meanflow:
            raise ValueError("Meanflow transformers, and no others, take a timestep_r.")
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        if name not in (None, *DTYPES):
            raise ValueError(f"dtype is {name}; it must be one of {', '.join(DTYPES)}, or None for the group's.")
        if memory is not None and not 0 < memory < 2**63:
            raise ValueError(f"memory is {memory}; it must be a number of bytes, or None for whatever is free.")
        times = _times(timestep, videos), () if timestep_r is None else _times(timestep_r, videos)
        keys = tuple(condition.key for condition in conditions)
        patched = None if patches is None else patches.key
        request = DenoiseRequest((videos, *grid), *times, keys, memory, averaged_times, name, patched)
        return cls(request, checkpoint, on_host(latents), tuple(conditions), patches)

    @property
    def memory(self) -> int | None:
        return self.request.memory

    @property
    def fields(self) -> dict:
        return {
            "checkpoint": place_of(self.checkpoint.path),
            "identity": self.checkpoint.identity,
            "request": asdict(self.request),
        }

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"latents": self.latents}

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        branches, channels = len(self.conditions), self.checkpoint.architecture.out_channels
        return {"rows": TensorSpec((branches, self.request.shape[0], self.request.tokens, channels))}

    @property
    def loads(self) -> tuple[Load, ...]:
        patches = () if self.patches is None else (self.patches.load(KIND),)
        return (*(condition.load for condition in self.conditions), *patches)

    def limited(self, memory: int) -> "DenoiseJob":
        return replace(self, request=replace(self.request, memory=memory))

    def velocity(self, rows: Tensor) -> Tensor:
        """The output "rows" as [branches, B, C', t, h, w], a view."""
        return rows.unflatten(2, self.request.shape[1:]).movedim(-1, 2)


def check_latents(latents: Tensor, videos: int | None = None) -> None:
    """Raise ValueError unless latents are [B, C, t, h, w] of floating point numbers. videos: what B must be."""
    if latents.ndim != 5 or min(latents.shape) < 1 or videos not in (None, len(latents)):
        raise ValueError(
            f"The latents have shape {list(latents.shape)}; they must be [{videos or 'videos'}, channels, frames, "
            "height, width], with no empty dimension."
        )
    if not latents.is_floating_point():
        raise ValueError(f"The latents hold {latents.dtype}; they must hold floating point numbers.")


def _times(timestep: float | Tensor, videos: int) -> tuple[float, ...]:
    times = torch.as_tensor(timestep).flatten().tolist()
    if len(times) not in (1, videos) or not all(map(math.isfinite, times)):
        raise ValueError(f"timestep is {times}; it must be one finite number, or one for each of {videos} videos.")
    return tuple(map(float, times * (videos // len(times))))


def _parts(
    checkpoint: TransformerCheckpoint, text: Tensor, glyphs: Tensor | None, image: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Check shapes. Return text, glyphs and image, with no tokens where there are none."""
    architecture = checkpoint.architecture
    if text.ndim != 3:
        raise ValueError(f"The text has shape {list(text.shape)}; it must be [videos, tokens, width].")
    glyphs = text.new_zeros(len(text), 0, architecture.glyph_width) if glyphs is None else glyphs
    image = text.new_zeros(len(text), 0, architecture.image_width) if image is None else image
    widths = architecture.text_width, architecture.glyph_width, architecture.image_width
    for name, part, width in zip(("text", "glyphs", "image"), (text, glyphs, image), widths, strict=True):
        if part.ndim != 3 or part.shape[::2] != (len(text), width):
            raise ValueError(
                f"The {name} has shape {list(part.shape)}; this transformer takes [{len(text)}, tokens, {width}]."
            )
    return text, glyphs, image


def _mask(name: str, part: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return part.new_ones(part.shape[:2])
    if mask.shape != part.shape[:2]:
        raise ValueError(f"The {name}'s mask has shape {list(mask.shape)}, not {list(part.shape[:2])}.")
    return mask
