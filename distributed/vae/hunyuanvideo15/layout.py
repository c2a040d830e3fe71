"""The tensors of HunyuanVideo-1.5's VAE: their names and shapes, and the distinction from other models.

Two layouts have the same 218 tensors: diffusers' and the original one (used by Tencent, Comfy-Org and core's `get_sd`).
They differ only in names. A layout is recognised by its keys. Every required tensor is checked by name and shape, so
that a decode never uses a weight that is not from the file. Other tensors are ignored, unless they identify the file as
another model's. This module imports no compute code.
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ...errors import CheckpointError
from ...quoting import first_names, quote
from ...safetensors_files import Shapes, problems

DIFFUSERS_CLASS = "AutoencoderKLHunyuanVideo15"

LEVELS = 5
TEMPORAL_UPSAMPLERS = 2
"""Number of upsamplers, starting at the lowest resolution, that also double the number of frames."""

LAYOUTS = (
    ("decoder.up.#.block.#.", "decoder.up_blocks.#.resnets.#."),
    ("decoder.up.#.upsample.", "decoder.up_blocks.#.upsamplers.0."),
    ("encoder.down.#.block.#.", "encoder.down_blocks.#.resnets.#."),
    ("encoder.down.#.downsample.", "encoder.down_blocks.#.downsamplers.0."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".mid.attn_1.", ".mid_block.attentions.0."),
)
"""Parts of keys in the original layout and in diffusers' layout. # is a number, the same in both."""

OTHER_MODELS = (
    ("decoder.upsamples.0.upsamples.0.residual.2.weight", "a Wan 2.2 VAE"),
    ("decoder.middle.0.residual.0.gamma", "a Wan 2.1 VAE"),
    ("decoder.mid_block.attentions.0.to_qkv.weight", "a Wan or Qwen-Image VAE"),
    ("decoder.unpatcher3d.wavelets", "a Cosmos VAE"),
    ("decoder.conv_in.conv_s.weight", "a Cosmos VAE"),
    ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight", "an LTX-Video VAE"),
    ("decoder.up_blocks.0.resnets.0.norm1.conv_y.conv.weight", "a CogVideoX VAE"),
    ("decoder.up_blocks.0.resnets.0.norm1.norm_layer.weight", "a Mochi VAE"),
    ("decoder.blocks.2.blocks.3.stack.5.weight", "a Mochi VAE"),
    ("blocks.2.blocks.3.stack.5.weight", "a Mochi VAE"),
    ("decoder.layers.1.layers.0.beta", "an audio VAE"),
    ("decoder.22.bias", "a small preview VAE (TAEHV or LightTAE)"),
    ("taesd_decoder.1.weight", "a TAESD preview VAE"),
    ("geo_decoder.cross_attn_decoder.ln_1.bias", "a Hunyuan3D VAE"),
    ("decoder.mid.block_1.mix_factor", "a Stable Video Diffusion VAE"),
    ("bn.running_mean", "a Flux 2 VAE"),
    ("pixel_space_vae", "a pixel-space VAE"),
    ("model.diffusion_model.img_in.weight", "a diffusion model"),
    ("transformer_blocks.0.attn.to_q.weight", "a diffusion transformer"),
)
"""Keys that identify files of other models, and the names of these models."""

WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts that wrappers of modules add to keys (torch.compile, data parallel, FSDP, activation checkpointing)."""

BLOCK = re.compile(
    r"((encoder|decoder)\.(?:mid_block|(?:up|down)_blocks\.\d+)\.(?:resnets|attentions|upsamplers|downsamplers)\.\d+)\."
)
"""The part of a key that identifies a block. A file with more blocks than expected is another model's."""

MOST_RESNETS = 16
"""Maximum number of residual blocks per level that is accepted. HunyuanVideo-1.5 has 3."""


def to_diffusers(name: str) -> str:
    """Convert a key of either layout to diffusers' layout, without the parts added by wrappers."""
    return _rename(unwrapped(name), _TO_DIFFUSERS)


def to_core(name: str) -> str:
    """Convert a key of either layout to the original layout, without the parts added by wrappers."""
    return _rename(unwrapped(name), _TO_CORE)


def unwrapped(name: str) -> str:
    """Remove the parts added by wrappers (see `WRAPPERS`) from a key."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _rule(old: str, new: str) -> tuple[re.Pattern, str]:
    """Return a pattern for `old`, at the start of a key unless `old` starts with a dot, and its replacement."""
    pattern = ("" if old.startswith(".") else "^") + re.escape(old).replace(re.escape("#"), r"(\d+)")
    numbers = itertools.count(1)
    return re.compile(pattern), re.sub("#", lambda _: f"\\{next(numbers)}", new)


_TO_DIFFUSERS = [_rule(core, diffusers) for core, diffusers in LAYOUTS]
_TO_CORE = [_rule(diffusers, core) for core, diffusers in LAYOUTS]


def _rename(name: str, rules: list[tuple[re.Pattern, str]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


class Architecture(NamedTuple):
    """The sizes of one VAE, which determine the shapes of all its tensors."""

    widths: tuple[int, ...]
    """Channels of each level of the decoder, lowest resolution first."""
    resnets: int = 3
    """Residual blocks per level of the decoder. The encoder has one fewer."""
    latent_channels: int = 32

    def decoder_shapes(self) -> Shapes:
        """Return the shapes of the decoder's tensors by diffusers' names, in the order of their use."""
        shapes: Shapes = {}
        _conv(shapes, "decoder.conv_in.conv", self.widths[0], self.latent_channels)
        _middle(shapes, "decoder.mid_block", self.widths[0])
        for level, width in enumerate(self.widths):
            for i in range(self.resnets):
                _resnet(shapes, f"decoder.up_blocks.{level}.resnets.{i}", width)
            if level + 1 < len(self.widths):
                out = self.widths[level + 1] * self.packed(level)
                _conv(shapes, f"decoder.up_blocks.{level}.upsamplers.0.conv.conv", out, width)
        shapes["decoder.norm_out.gamma"] = (self.widths[-1], 1, 1, 1)
        _conv(shapes, "decoder.conv_out.conv", 3, self.widths[-1])
        return shapes

    def encoder_shapes(self) -> Shapes:
        """Return the shapes of the encoder's tensors by diffusers' names. Its levels are the decoder's in reverse."""
        shapes: Shapes = {}
        widths = self.widths[::-1]
        _conv(shapes, "encoder.conv_in.conv", widths[0], 3)
        for level, width in enumerate(widths):
            for i in range(self.resnets - 1):
                _resnet(shapes, f"encoder.down_blocks.{level}.resnets.{i}", width)
            if level + 1 < len(widths):
                out = widths[level + 1] // self.packed(len(widths) - 2 - level)
                _conv(shapes, f"encoder.down_blocks.{level}.downsamplers.0.conv.conv", out, width)
        _middle(shapes, "encoder.mid_block", widths[-1])
        shapes["encoder.norm_out.gamma"] = (widths[-1], 1, 1, 1)
        _conv(shapes, "encoder.conv_out.conv", 2 * self.latent_channels, widths[-1])
        return shapes

    @staticmethod
    def packed(level: int) -> int:
        """Return the number of pixels that a level's upsampler makes of one pixel: 2x2, in 1 or 2 frames."""
        return 8 if level < TEMPORAL_UPSAMPLERS else 4


def _conv(shapes: Shapes, key: str, out: int, into: int, size: int = 3) -> None:
    shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (out, into, size, size, size), (out,)


def _resnet(shapes: Shapes, key: str, width: int) -> None:
    for i in (1, 2):
        shapes[f"{key}.norm{i}.gamma"] = (width, 1, 1, 1)
        _conv(shapes, f"{key}.conv{i}.conv", width, width)


def _middle(shapes: Shapes, key: str, width: int) -> None:
    for i in range(2):
        _resnet(shapes, f"{key}.resnets.{i}", width)
    shapes[f"{key}.attentions.0.norm.gamma"] = (width, 1, 1, 1)
    for name in ("to_q", "to_k", "to_v", "proj_out"):
        _conv(shapes, f"{key}.attentions.0.{name}", width, width, 1)


def recognise(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    """Return the layout of tensors, "diffusers" or "core", determined by their keys.

    Raises CheckpointError for another model. name: the name of the VAE in messages.
    """
    shapes = {unwrapped(key): shape for key, shape in shapes.items()}
    if model := _other_model(shapes):
        raise CheckpointError(f"{name} is {model}, not HunyuanVideo-1.5's.")
    if len(shapes.get("decoder.conv_in.conv.weight", ())) == 5:
        if (
            "decoder.mid_block.attentions.0.to_q.weight" in shapes
            and "decoder.up_blocks.0.resnets.0.norm1.gamma" in shapes
        ):
            return "diffusers"
        if "decoder.mid.attn_1.q.weight" in shapes and "decoder.up.0.block.0.norm1.gamma" in shapes:
            return "core"
    raise CheckpointError(
        f"{name} is not a HunyuanVideo-1.5 VAE: it holds {first_names(sorted(shapes)) or 'no tensors'}."
    )


def by_diffusers_name(keys: Iterable[str], name: str) -> dict[str, str]:
    """Map diffusers' names to keys of either layout. Raises CheckpointError if two keys have the same name."""
    found: dict[str, str] = {}
    for key in keys:
        other = found.setdefault(to_diffusers(key), key)
        if other != key:
            raise CheckpointError(f"{name} has the same tensor twice, as {quote(other)} and as {quote(key)}.")
    return found


def _other_model(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    for key, model in OTHER_MODELS:
        if key in shapes:
            return model
    if "decoder.conv_in.conv.weight" in shapes:
        norms = ("decoder.up.0.block.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight")
        return "a HunyuanVideo 1.0 VAE" if any(norm in shapes for norm in norms) else None
    first = shapes.get("decoder.conv_in.weight", ())
    if len(first) == 5:
        return "a HunyuanImage 3.0 VAE" if first[1] == 32 else "a video VAE of another model"
    if len(first) == 4:
        return {
            4: "a Stable Diffusion VAE",
            16: "a Flux or Stable Diffusion 3 VAE",
            64: "a HunyuanImage 2.1 VAE",
        }.get(first[1], "an image model's VAE")
    return None


def read_architecture(shapes: Mapping[str, tuple[int, ...]], name: str) -> Architecture:
    """Return the architecture of a VAE with tensors of these shapes, by diffusers' names.

    Raises CheckpointError if HunyuanVideo-1.5's VAE cannot have these shapes.
    """

    def count(pattern: str) -> int:
        return len({match[1] for key in shapes if (match := re.match(pattern, key))})

    levels = count(r"decoder\.up_blocks\.(\d+)\.")
    resnets = count(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.")
    if levels != LEVELS:
        raise CheckpointError(f"{name} has {levels} decoder levels; HunyuanVideo-1.5 has {LEVELS}.")
    if not 1 <= resnets <= MOST_RESNETS:
        raise CheckpointError(f"{name} has {resnets} residual blocks in a decoder level; HunyuanVideo-1.5 has 3.")
    firsts = (shapes.get(f"decoder.up_blocks.{i}.resnets.0.conv1.conv.weight", ()) for i in range(levels))
    widths = tuple(first[0] if first else 0 for first in firsts)
    latent = shapes["decoder.conv_in.conv.weight"][1]
    if 0 in widths:
        raise CheckpointError(
            f"{name} has decoder levels of widths {list(widths)}; every level needs at least one channel."
        )
    if latent < 1 or widths[0] % latent:
        raise CheckpointError(
            f"{name} has {latent} latent channels; they must divide the decoder's width, {widths[0]}."
        )
    return Architecture(widths, resnets, latent)


def check_tensors(
    expected: Shapes, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, object], name: str
) -> None:
    """Raise CheckpointError if expected tensors are missing or unusable, or if encoder or decoder has more blocks.

    shapes, dtypes: of the existing tensors, by diffusers' names. name: the name of the VAE in messages.
    """
    if found := problems(expected, shapes, dtypes):
        raise CheckpointError(f"{name} is not a complete HunyuanVideo-1.5 VAE: it {'; it '.join(found)}.")
    blocks = {match[1]: match[2] for key in expected if (match := BLOCK.match(key))}
    halves = set(blocks.values())
    further = [key for key in shapes if (m := BLOCK.match(key)) and m[2] in halves and m[1] not in blocks]
    if further:
        raise CheckpointError(
            f"{name} is not a HunyuanVideo-1.5 VAE: it has more blocks ({first_names(sorted(further))})."
        )
