"""What the controller knows of a denoising step: the conditions, the request and their checks. Imports no compute."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..jobs import Load, TensorSpec
from ..ranks.buffers import DTYPES
from ..ranks.shared_memory import place_of
from .conditions import trim
from .weights import TransformerCheckpoint

KIND = "denoise"
"""How the group's status shows this kind of job."""
NOUN = "denoising step"
"""What messages call it."""

PARTS = ("text", "glyphs", "image")
"""What conditions are made of, for each video."""

MOST_BRANCHES = 2


@dataclass(frozen=True, eq=False)
class Conditions:
    """What a prompt gives to all steps of a batch of videos: checked, cut to its valid tokens, on the CPU.

    `key` says which they are: equal contents have equal keys. `tensors` are, for each video i, "text.i", "glyphs.i" and
    "image.i", [tokens, width] each; and "latents", [B, C, t, h, w], if there are condition channels.
    """

    key: str
    videos: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def make(
        cls,
        checkpoint: TransformerCheckpoint,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        encoder_hidden_states_2: Tensor | None = None,
        encoder_attention_mask_2: Tensor | None = None,
        image_embeds: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> "Conditions":
        """Check conditions, named as in diffusers' forward, and cut them.

        encoder_hidden_states: the text, [B, N, C], with its mask [B, N]. encoder_hidden_states_2: glyph text,
        [B, M, C'], with its mask. image_embeds: [B, K, C'']; zeros are no image. latents: condition channels that are
        the same in all steps, [B, C, t, h, w]. Raises ValueError for what does not fit the transformer or each other.
        """
        architecture, text = checkpoint.architecture, encoder_hidden_states
        if text.ndim != 3:
            raise ValueError(f"The text has shape {list(text.shape)}; [videos, tokens, width] belongs there.")
        parts = {"text": (text, encoder_attention_mask, architecture.text_width)}
        for name, part, mask, width in (
            ("glyphs", encoder_hidden_states_2, encoder_attention_mask_2, architecture.glyph_width),
            ("image", image_embeds, None, architecture.image_width),
        ):
            parts[name] = (text.new_zeros(len(text), 0, width) if part is None else part, mask, width)
        for name, (part, mask, width) in parts.items():
            if part.ndim != 3 or part.shape[::2] != (len(text), width):
                raise ValueError(
                    f"The {name} has shape {list(part.shape)}; this transformer takes [{len(text)}, tokens, {width}]."
                )
            if mask is not None and mask.shape != part.shape[:2]:
                raise ValueError(f"The {name}'s mask has shape {list(mask.shape)}, not {list(part.shape[:2])}.")
        glyphs, glyphs_mask, _ = parts["glyphs"]
        if glyphs_mask is None:
            glyphs_mask = glyphs.new_ones(glyphs.shape[:2])
        cut = trim(text, encoder_attention_mask, glyphs, glyphs_mask, parts["image"][0])
        tensors = {f"{part}.{i}": _on_host(getattr(one, part)) for i, one in enumerate(cut) for part in PARTS}
        if latents is not None:
            check_latents(latents, len(text))
            tensors["latents"] = _on_host(latents)
        return cls(_digest(tensors), len(text), tensors)

    @property
    def load(self) -> Load:
        """What has ranks keep these conditions."""
        return Load(KIND, {"key": self.key, "videos": self.videos}, self.tensors)


@dataclass(frozen=True)
class DenoiseRequest:
    """The one description of a denoising step. JSON-able through `dataclasses.asdict`.

    shape is [B, t, h, w] of the latents. timesteps, timesteps_r: one for each video; timesteps_r is empty but for
    meanflow models. conditions: the key of each branch. memory: bytes that each rank may use, weights included (None:
    all that is free).
    """

    shape: tuple[int, int, int, int]
    timesteps: tuple[float, ...]
    timesteps_r: tuple[float, ...]
    conditions: tuple[str, ...]
    memory: int | None = None

    @classmethod
    def from_json(cls, value: Mapping) -> "DenoiseRequest":
        """Return the request that became this in JSON."""
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
    ) -> "DenoiseJob":
        """Check everything about a step. Raises ValueError.

        latents: [B, C, t, h, w]; the conditions' latents are the other channels. timestep: one, or one for each video.
        """
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
        if (timestep_r is not None) != checkpoint.architecture.meanflow:
            raise ValueError("Meanflow transformers, and no others, take a timestep_r.")
        if memory is not None and not 0 < memory < 2**63:
            raise ValueError(f"memory is {memory}; it must be a number of bytes, or None for whatever is free.")
        times = _times(timestep, videos), () if timestep_r is None else _times(timestep_r, videos)
        keys = tuple(condition.key for condition in conditions)
        request = DenoiseRequest((videos, *grid), *times, keys, memory)
        return cls(request, checkpoint, _on_host(latents), tuple(conditions))

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
        return tuple(condition.load for condition in self.conditions)

    def limited(self, memory: int) -> "DenoiseJob":
        return replace(self, request=replace(self.request, memory=memory))

    def velocity(self, rows: Tensor) -> Tensor:
        """The output "rows" as [branches, B, C', t, h, w], a view."""
        return rows.unflatten(2, self.request.shape[1:]).movedim(-1, 2)


def check_latents(latents: Tensor, videos: int | None = None) -> None:
    """Refuse, with a ValueError, what is not [B, C, t, h, w] of floating point numbers. videos: what B must be."""
    if latents.ndim != 5 or min(latents.shape) < 1 or videos not in (None, len(latents)):
        raise ValueError(
            f"The latents have shape {list(latents.shape)}; [{videos or 'videos'}, channels, frames, height, width] "
            "belongs there, with no empty dimension."
        )
    if not latents.is_floating_point():
        raise ValueError(f"The latents hold {latents.dtype}; they must hold floating point numbers.")


def _times(timestep: float | Tensor, videos: int) -> tuple[float, ...]:
    times = torch.as_tensor(timestep).flatten().tolist()
    if len(times) not in (1, videos) or not all(map(math.isfinite, times)):
        raise ValueError(f"timestep is {times}; one finite number belongs there, or one for each of {videos} videos.")
    return tuple(map(float, times * (videos // len(times))))


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, in a dtype that can be shared."""
    dtype = tensor.dtype if tensor.dtype in DTYPES.values() else torch.float32
    return tensor.detach().to("cpu", dtype).contiguous()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
