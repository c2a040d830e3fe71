"""What HunyuanVideo-1.5's transformer consists of: sizes, and the names and shapes of its tensors in each layout.

- "diffusers": a folder with a config.
- "core": one file without a config, as ComfyUI's loaders read it. The sizes follow from the shapes. Queries, keys and
  values are one tensor, and the output norm's shift is stored before its scale.
- "tencent": Tencent's own files. They differ from "core" in spelling, and the blocks' queries, keys and values are
  three tensors. `scripts/convert_hunyuan_video1_5_to_diffusers.py` of diffusers reads them.

This module imports no compute.
"""

import re
from collections.abc import Collection, Mapping
from functools import cache
from typing import NamedTuple

from ..errors import CheckpointError
from ..quoting import first_names, quote
from ..safetensors_files import Shapes

DIFFUSERS_CLASS = "HunyuanVideo15Transformer3DModel"

FREQUENCIES = 256
"""Width of a timestep's sinusoidal embedding."""
GLYPH_WIDTH = 2048
"""Inner width of the embedder of glyph text."""
REFINER_RATIO = 4
"""Inner width of the token refiner's MLP, in widths of the model."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
"""Prefixes of the original layout's keys in some files, the longest first."""

PARTS = (
    ("x_embedder.proj", "img_in.proj"),
    ("image_embedder.norm_in", "vision_in.proj.0"),
    ("image_embedder.linear_1", "vision_in.proj.1"),
    ("image_embedder.linear_2", "vision_in.proj.3"),
    ("image_embedder.norm_out", "vision_in.proj.4"),
    ("context_embedder_2.norm", "byt5_in.layernorm"),
    ("context_embedder_2.linear_", "byt5_in.fc"),
    ("time_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    ("time_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    ("time_embed.timestep_embedder_r.linear_1", "time_r_in.in_layer"),
    ("time_embed.timestep_embedder_r.linear_2", "time_r_in.out_layer"),
    ("context_embedder.proj_in", "txt_in.input_embedder"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_1", "txt_in.t_embedder.in_layer"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_2", "txt_in.t_embedder.out_layer"),
    ("context_embedder.time_text_embed.text_embedder.linear_1", "txt_in.c_embedder.in_layer"),
    ("context_embedder.time_text_embed.text_embedder.linear_2", "txt_in.c_embedder.out_layer"),
    ("context_embedder.token_refiner.refiner_blocks.", "txt_in.individual_token_refiner.blocks."),
    ("cond_type_embed.", "cond_type_embedding."),
    ("norm_out.linear", "final_layer.adaLN_modulation.1"),
    ("proj_out", "final_layer.linear"),
    ("transformer_blocks.", "double_blocks."),
)
"""Prefixes of keys in diffusers' layout and in the original one."""

REFINER_PARTS = (
    ("attn.to_out.0", "self_attn.proj"),
    ("attn.to_", "self_attn.qkv"),
    ("ff.net.0.proj", "mlp.0"),
    ("ff.net.2", "mlp.2"),
    ("norm_out.linear", "adaLN_modulation.1"),
)
BLOCK_PARTS = (
    ("norm1.linear", "img_mod.lin"),
    ("norm1_context.linear", "txt_mod.lin"),
    ("attn.to_out.0", "img_attn.proj"),
    ("attn.to_add_out", "txt_attn.proj"),
    ("attn.norm_added_q", "txt_attn.norm.query_norm"),
    ("attn.norm_added_k", "txt_attn.norm.key_norm"),
    ("attn.norm_q", "img_attn.norm.query_norm"),
    ("attn.norm_k", "img_attn.norm.key_norm"),
    ("attn.to_", "img_attn.qkv"),
    ("attn.add_", "txt_attn.qkv"),
    ("ff.net.0.proj", "img_mlp.0"),
    ("ff.net.2", "img_mlp.2"),
    ("ff_context.net.0.proj", "txt_mlp.0"),
    ("ff_context.net.2", "txt_mlp.2"),
)
"""The same within a block of the token refiner and of the transformer."""

QK_NORMS = {"q": "query_norm", "k": "key_norm"}
SPELLINGS = (
    (re.compile(r"^(time_in|time_r_in|txt_in\.t_embedder)\.mlp\.0\."), r"\1.in_layer."),
    (re.compile(r"^(time_in|time_r_in|txt_in\.t_embedder)\.mlp\.2\."), r"\1.out_layer."),
    (re.compile(r"^txt_in\.c_embedder\.linear_1\."), "txt_in.c_embedder.in_layer."),
    (re.compile(r"^txt_in\.c_embedder\.linear_2\."), "txt_in.c_embedder.out_layer."),
    (re.compile(r"^(.*\.mlp|.*_mlp)\.fc1\."), r"\1.0."),
    (re.compile(r"^(.*\.mlp|.*_mlp)\.fc2\."), r"\1.2."),
    (re.compile(r"_attn_([qk])_norm\."), lambda match: f"_attn.norm.{QK_NORMS[match[1]]}."),
    (re.compile(r"_attn_(q|k|v|qkv|proj)\."), r"_attn.\1."),
    (re.compile(r"_mod\.linear\."), "_mod.lin."),
    (re.compile(r"_norm\.scale$"), "_norm.weight"),
    (re.compile(r"\.scale_weight$"), ".weight_scale"),
    (re.compile(r"\.scale_input$"), ".input_scale"),
)
"""Spellings of the original layout's keys, and the spelling that is used here."""

SCALE = "_scale"
"""Suffix that makes the key of a scale from the key of its 8-bit weight."""

FURTHER_LAYERS = ("guidance_in.", "vector_in.")
"""Prefixes of layers that other models of the family have. Other tensors that core does not read are ignored."""

_PROJECTION = re.compile(r"attn\.(?:to|add)_([qkv])(?:_proj)?\.(weight|bias)$")


class Architecture(NamedTuple):
    """The sizes of one transformer, from which the shapes of all its tensors follow.

    The defaults are those of the real one. Its patches are single latent pixels.
    """

    in_channels: int = 65
    out_channels: int = 32
    heads: int = 16
    head_dim: int = 128
    layers: int = 54
    refiner_layers: int = 2
    mlp_ratio: float = 4.0
    text_width: int = 3584
    glyph_width: int = 1472
    image_width: int = 1152
    rope_axes: tuple[int, ...] = (16, 56, 56)
    rope_theta: float = 256.0
    meanflow: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def config(self) -> dict:
        """The arguments of diffusers' class."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "num_layers": self.layers,
            "num_refiner_layers": self.refiner_layers,
            "mlp_ratio": self.mlp_ratio,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": self.text_width,
            "text_embed_2_dim": self.glyph_width,
            "image_embed_dim": self.image_width,
            "rope_axes_dim": self.rope_axes,
            "rope_theta": self.rope_theta,
            "use_meanflow": self.meanflow,
        }

    def shapes(self) -> Shapes:
        """Shapes of all tensors in diffusers' names."""
        shapes: Shapes = {}
        width = self.width

        def linear(key: str, out: int, into: int) -> None:
            shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (out, into), (out,)

        def norm(key: str, size: int, bias: bool = True) -> None:
            shapes[f"{key}.weight"] = (size,)
            if bias:
                shapes[f"{key}.bias"] = (size,)

        def two(key: str, into: int) -> None:
            linear(f"{key}.linear_1", width, into)
            linear(f"{key}.linear_2", width, width)

        shapes["x_embedder.proj.weight"] = (width, self.in_channels, 1, 1, 1)
        shapes["x_embedder.proj.bias"] = (width,)
        norm("image_embedder.norm_in", self.image_width)
        linear("image_embedder.linear_1", self.image_width, self.image_width)
        linear("image_embedder.linear_2", width, self.image_width)
        norm("image_embedder.norm_out", width)
        two("context_embedder.time_text_embed.timestep_embedder", FREQUENCIES)
        two("context_embedder.time_text_embed.text_embedder", self.text_width)
        linear("context_embedder.proj_in", width, self.text_width)
        for i in range(self.refiner_layers):
            block = f"context_embedder.token_refiner.refiner_blocks.{i}"
            norm(f"{block}.norm1", width)
            norm(f"{block}.norm2", width)
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                linear(f"{block}.attn.{part}", width, width)
            linear(f"{block}.ff.net.0.proj", REFINER_RATIO * width, width)
            linear(f"{block}.ff.net.2", width, REFINER_RATIO * width)
            linear(f"{block}.norm_out.linear", 2 * width, width)
        norm("context_embedder_2.norm", self.glyph_width)
        linear("context_embedder_2.linear_1", GLYPH_WIDTH, self.glyph_width)
        linear("context_embedder_2.linear_2", GLYPH_WIDTH, GLYPH_WIDTH)
        linear("context_embedder_2.linear_3", width, GLYPH_WIDTH)
        two("time_embed.timestep_embedder", FREQUENCIES)
        if self.meanflow:
            two("time_embed.timestep_embedder_r", FREQUENCIES)
        shapes["cond_type_embed.weight"] = (3, width)
        inner = int(width * self.mlp_ratio)
        for i in range(self.layers):
            block = f"transformer_blocks.{i}"
            linear(f"{block}.norm1.linear", 6 * width, width)
            linear(f"{block}.norm1_context.linear", 6 * width, width)
            for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                norm(f"{block}.attn.{part}", self.head_dim, bias=False)
            for part in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
                linear(f"{block}.attn.{part}", width, width)
            for part in ("ff", "ff_context"):
                linear(f"{block}.{part}.net.0.proj", inner, width)
                linear(f"{block}.{part}.net.2", width, inner)
        linear("norm_out.linear", 2 * width, width)
        linear("proj_out", self.out_channels, width)
        return shapes


def modulates(name: str) -> bool:
    """Whether a tensor, by its name in diffusers' layout, serves the modulation and nothing else."""
    return (
        re.fullmatch(r"(transformer_blocks\.\d+\.norm1(_context)?|norm_out)\.linear\.(weight|bias)", name) is not None
    )


def block_of(name: str) -> tuple[int | None, str]:
    """Return the number of the block that has a tensor, and the tensor's name in the block, from its diffusers name.

    The number is None for a tensor outside of the blocks.
    """
    found = re.match(r"transformer_blocks\.(\d+)\.", name)
    return (int(found[1]), name[found.end() :]) if found else (None, name)


class Source(NamedTuple):
    """Where a tensor of diffusers' layout is in the original one."""

    key: str
    third: int | None = None
    """Its third of the rows, if queries, keys and values are one tensor."""
    swapped: bool = False
    """Whether its halves are in the opposite order."""


@cache
def source_of(name: str, layout: str = "core") -> Source:
    """Return where "core" or "tencent" stores what diffusers calls `name`."""
    if name.startswith("norm_out.linear"):
        return Source(_rename(name, PARTS), swapped=True)
    block = re.match(r"(transformer_blocks|context_embedder\.token_refiner\.refiner_blocks)\.\d+\.", name)
    if block is None:
        return Source(_rename(name, PARTS))
    start, rest = _rename(block[0], PARTS), name[block.end() :]
    inner = BLOCK_PARTS if block[1] == "transformer_blocks" else REFINER_PARTS
    renamed = _rename(rest, inner)
    if fused := _PROJECTION.search(rest):
        if layout == "tencent" and inner is BLOCK_PARTS:
            return Source(f"{start}{renamed.split('.qkv')[0]}.{fused[1]}.{fused[2]}")
        return Source(f"{start}{renamed.split('.qkv')[0]}.qkv.{fused[2]}", third="qkv".index(fused[1]))
    return Source(start + renamed)


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    return next((new + name.removeprefix(old) for old, new in rules if name.startswith(old)), name)


def original_names(keys: Collection[str], name: str) -> dict[str, str]:
    """Keys of a file in the original layout by the names that `source_of` gives. Other models' keys are left out.

    The scale of X.weight becomes X.weight_scale.

    Raises CheckpointError for a tensor that is there twice; `name` is what messages call the file.
    """
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in keys)), "")
    found: dict[str, str] = {}
    for key in keys:
        if key.startswith(prefix):
            new = key.removeprefix(prefix)
            for pattern, replacement in SPELLINGS:
                new = pattern.sub(replacement, new)
            if new in found:
                raise CheckpointError(
                    f"{name} holds the same tensor twice, as {quote(found[new])} and as {quote(key)}."
                )
            found[new] = key
    return found


def recognise(keys: Collection[str], name: str) -> str:
    """Return the layout of a transformer's keys, which are without prefixes and in the spelling of `original_names`.

    Raises CheckpointError for another model's; `name` is what messages call the file.
    """
    single = any(key.startswith(("single_blocks.", "single_transformer_blocks.")) for key in keys)
    if not single and "cond_type_embed.weight" in keys and "context_embedder_2.linear_1.weight" in keys:
        return "diffusers"
    if not single and "cond_type_embedding.weight" in keys and "byt5_in.fc1.weight" in keys:
        return "tencent" if "double_blocks.0.img_attn.q.weight" in keys else "core"
    model = (
        "is a transformer with single-stream blocks, such as HunyuanVideo 1.0's or Flux's, not"
        if single
        else (f"holds {first_names(sorted(keys)) or 'nothing'}, and is not")
    )
    raise CheckpointError(f"{name} {model} HunyuanVideo-1.5's transformer.")


def architecture_of_config(config: Mapping, name: str) -> Architecture:
    """The sizes in a diffusers config. Raises CheckpointError for what cannot be, or is no HunyuanVideo-1.5."""

    def value(key: str, default: object, kinds: tuple[type, ...], most: float) -> object:
        found = config.get(key, default)
        if type(found) not in kinds or not 0 < found <= most:
            raise CheckpointError(f"{name}: its config's {key} is {quote(found)}; it must be a number above 0.")
        return found

    def whole(key: str, default: int, most: int = 2**20) -> int:
        return value(key, default, (int,), most)

    default = Architecture()
    for key, wanted in (("patch_size", 1), ("patch_size_t", 1), ("qk_norm", "rms_norm")):
        if config.get(key, wanted) != wanted:
            raise CheckpointError(f"{name}: its config's {key} is {quote(config[key])}; HunyuanVideo-1.5 has {wanted}.")
    head_dim = whole("attention_head_dim", default.head_dim, 1024)
    axes = config.get("rope_axes_dim", default.rope_axes)
    if (
        not isinstance(axes, (list, tuple))
        or len(axes) != 3
        or not all(type(axis) is int and axis > 0 and axis % 2 == 0 for axis in axes)
        or sum(axes) != head_dim
    ):
        raise CheckpointError(
            f"{name}: its config's rope_axes_dim is {quote(axes)}; three even numbers belong there whose sum is the "
            f"width of a head, {head_dim}."
        )
    if type(meanflow := config.get("use_meanflow", False)) is not bool:
        raise CheckpointError(f"{name}: its config's use_meanflow is {quote(meanflow)}; it must be true or false.")
    in_channels = whole("in_channels", default.in_channels)
    return Architecture(
        in_channels,
        whole("out_channels", default.out_channels) if config.get("out_channels", 1) is not None else in_channels,
        whole("num_attention_heads", default.heads, 1024),
        head_dim,
        whole("num_layers", default.layers, 1024),
        whole("num_refiner_layers", default.refiner_layers, 1024),
        float(value("mlp_ratio", default.mlp_ratio, (int, float), 64)),
        whole("text_embed_dim", default.text_width),
        whole("text_embed_2_dim", default.glyph_width),
        whole("image_embed_dim", default.image_width),
        tuple(axes),
        float(value("rope_theta", default.rope_theta, (int, float), 1e9)),
        meanflow,
    )


def architecture_of_shapes(shapes: Mapping[str, tuple[int, ...]], name: str) -> Architecture:
    """The sizes that shapes of the original layout imply. Raises CheckpointError where they cannot be this model's."""

    def size(key: str, dim: int) -> int:
        shape = shapes.get(key, ())
        if len(shape) <= dim or not shape[dim]:
            raise CheckpointError(f"{name} is not a complete HunyuanVideo-1.5 transformer: it lacks {quote(key)}.")
        return shape[dim]

    def count(pattern: str) -> int:
        return len({match[1] for key in shapes if (match := re.match(pattern, key))})

    default = Architecture()
    width, head_dim = size("img_in.proj.weight", 0), size("double_blocks.0.img_attn.norm.query_norm.weight", 0)
    if head_dim != default.head_dim or width % head_dim:
        raise CheckpointError(
            f"{name} has a width of {width} and heads of {head_dim}; HunyuanVideo-1.5 has heads of {default.head_dim}."
        )
    return Architecture(
        size("img_in.proj.weight", 1),
        size("final_layer.linear.weight", 0),
        width // head_dim,
        head_dim,
        count(r"double_blocks\.(\d+)\."),
        count(r"txt_in\.individual_token_refiner\.blocks\.(\d+)\."),
        size("double_blocks.0.img_mlp.0.weight", 0) / width,
        size("txt_in.input_embedder.weight", 1),
        size("byt5_in.layernorm.weight", 0),
        size("vision_in.proj.0.weight", 0),
        meanflow="time_r_in.in_layer.weight" in shapes or "time_r_in.in_layer.bias" in shapes,
    )
