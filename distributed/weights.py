"""Checkpoints of the VAE: which layout a file has, and its decoder's tensors in diffusers' names.

Two layouts hold the same 218 tensors: diffusers' and the original one (Tencent's, Comfy-Org's, core's `get_sd`).
One maps to the other by renaming alone. A layout is recognised by its keys and checked, key by key and shape by
shape, so that nothing is ever decoded with a weight that did not come from the file. Files are safetensors only.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

RENAMES = (
    (r"^decoder\.up\.(\d+)\.block\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
)
"""From the original layout to diffusers'."""

BACK = (
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r"decoder.up.\1.block.\2."),
    (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.up.\1.upsample."),
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.down.\1.block.\2."),
    (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
)
"""From diffusers' layout to the original."""

OTHER_MODELS = (
    ("decoder.middle.0.residual.0.gamma", "a Wan VAE"),
    ("decoder.unpatcher3d.wavelets", "a Cosmos VAE"),
    ("decoder.mid_block.resnets.0.conv1.weight", "an image VAE (Stable Diffusion or Flux, diffusers layout)"),
    ("decoder.mid.block_1.conv1.weight", "an image VAE (Stable Diffusion, Flux or HunyuanImage)"),
    ("decoder.up_blocks.0.upsamplers.0.conv.conv.bias_", "another VAE"),
    ("post_quant_conv.conv.weight", "a HunyuanVideo 1.0 VAE"),
    ("post_quant_conv.weight", "a VAE of another model (HunyuanVideo 1.0 or an image model)"),
    ("taesd_decoder.1.weight", "a TAESD preview VAE"),
    ("geo_decoder.cross_attn_decoder.ln_1.bias", "a Hunyuan3D VAE"),
    ("model.diffusion_model.img_in.weight", "a diffusion model"),
    ("transformer_blocks.0.attn.to_q.weight", "a diffusion transformer"),
)


class CheckpointError(ValueError):
    """The file is not a HunyuanVideo-1.5 VAE that can be used; says what it is or what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A VAE on disk that was recognised and checked."""

    files: tuple[Path, ...]
    layout: str
    """"diffusers" or "core"."""
    latent_channels: int
    block_out_channels: tuple[int, ...]
    """As in diffusers' config: highest resolution first."""
    layers_per_block: int
    dtype: torch.dtype
    has_encoder: bool

    @property
    def identity(self) -> str:
        """Changes when the files do."""
        stats = [(path, path.stat()) for path in self.files]
        return "|".join(f"{path}:{s.st_size}:{s.st_mtime_ns}" for path, s in stats)


def to_diffusers(name: str) -> str:
    """A key of either layout, in diffusers' naming."""
    return _rename(name, RENAMES)


def to_core(name: str) -> str:
    """A key of either layout, in the original naming."""
    return _rename(name, BACK)


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Recognise and check a VAE: a .safetensors file of either layout, or a diffusers folder.

    Raises CheckpointError with what is wrong, FileNotFoundError where there is nothing.
    """
    files = _files(Path(path))
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for file in files:
        with _open(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  not a mapping
                part = tensors.get_slice(key)
                shapes[key], dtypes[key] = tuple(part.get_shape()), part.get_dtype()
    name = Path(path).name
    layout = _layout(shapes, name)
    shapes = {to_diffusers(key): shape for key, shape in shapes.items()}
    widths, layers = _check(shapes, name)
    first = dtypes[next(key for key in dtypes if to_diffusers(key) == "decoder.conv_in.conv.weight")]
    if first not in _DTYPES:
        raise CheckpointError(f"{name} stores its weights as {first}; float32, bfloat16 and float16 can be used.")
    return Checkpoint(
        files,
        layout,
        shapes["decoder.conv_in.conv.weight"][1],
        tuple(reversed(widths)),
        layers,
        _DTYPES[first],
        any(key.startswith("encoder.") for key in shapes),
    )


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def decoder_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The decoder's tensors, mapped from the file, in diffusers' names without "decoder."."""
    found = all_tensors(checkpoint)
    return {key.removeprefix("decoder."): value for key, value in found.items() if key.startswith("decoder.")}


def all_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors, mapped from the file, in diffusers' names."""
    found: dict[str, Tensor] = {}
    for file in checkpoint.files:
        with _open(file) as tensors:
            found |= {to_diffusers(key): tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    return found


def share_state_dict(state_dict: Mapping[str, Tensor], folder: str | os.PathLike, name: str = "vae") -> Path:
    """Hand over weights that exist only in memory: write their decoder once, for all ranks of a host to map.

    Either layout. Returns the file, readable by its owner alone. Raises CheckpointError as `open_checkpoint` does.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    _layout(shapes, "The VAE")
    _check({to_diffusers(key): shape for key, shape in shapes.items()}, "The VAE")
    decoder = {
        to_diffusers(key): tensor.detach().to("cpu").contiguous()
        for key, tensor in state_dict.items()
        if key.startswith("decoder.")
    }
    path = Path(folder) / f"{name}.safetensors"
    mask = os.umask(0o077)
    try:
        save_file(decoder, path)
    finally:
        os.umask(mask)
    return path


def _files(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        if index.is_file():
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = tuple(folder / Path(part).name for part in parts)
        else:
            files = (folder / "diffusion_pytorch_model.safetensors",)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"The folder {folder.name} has no {', '.join(missing)}.")
        return files
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path.name}.")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path.name} is not a .safetensors file; other formats can run code and are not read.")
    return (path,)


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file.name} cannot be read as safetensors ({error}). It may be cut short, or another format renamed."
        ) from error


def _layout(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    attention = "decoder.mid_block.attentions.0.to_q.weight"
    if len(shapes.get("decoder.conv_in.conv.weight", ())) == 5:
        if attention in shapes and "decoder.up_blocks.0.resnets.0.norm1.gamma" in shapes:
            return "diffusers"
        if "decoder.mid.attn_1.q.weight" in shapes and "decoder.up.0.block.0.norm1.gamma" in shapes:
            return "core"
        if "decoder.up.0.block.0.norm1.weight" in shapes:
            raise CheckpointError(f"{name} is a HunyuanImage refiner or HunyuanVideo 1.0 VAE, not HunyuanVideo-1.5's.")
    for key, model in OTHER_MODELS:
        if key in shapes:
            raise CheckpointError(f"{name} is {model}, not HunyuanVideo-1.5's.")
    some = ", ".join(sorted(shapes)[:3]) or "nothing"
    raise CheckpointError(f"{name} is not a HunyuanVideo-1.5 VAE: it holds {some} and {max(0, len(shapes) - 3)} more.")


def _check(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[tuple[int, ...], int]:
    """Compare keys and shapes with those that the widths imply. Returns the widths, deepest first, and the layers."""

    def number(pattern: str) -> int:
        return len({match[1] for key in shapes if (match := re.match(pattern, key))})

    levels = number(r"decoder\.up_blocks\.(\d+)\.")
    layers = number(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1
    widths = tuple(shapes.get(f"decoder.up_blocks.{i}.resnets.0.conv1.conv.weight", (0,))[0] for i in range(levels))
    if levels != 5 or layers < 0 or 0 in widths:
        raise CheckpointError(f"{name} has {levels} decoder levels of widths {list(widths)}; HunyuanVideo-1.5 has 5.")
    latent = shapes["decoder.conv_in.conv.weight"][1]
    expected = _decoder_shapes(widths, layers + 1, latent)
    decoder = {key: tuple(shape) for key, shape in shapes.items() if key.startswith("decoder.")}
    missing, extra = sorted(expected.keys() - decoder.keys()), sorted(decoder.keys() - expected.keys())
    wrong = sorted(key for key in expected.keys() & decoder.keys() if expected[key] != decoder[key])
    problems = [f"lacks {_some(missing)}"] * bool(missing) + [f"has unknown {_some(extra)}"] * bool(extra)
    problems += [f"has {key} of shape {decoder[key]} where {expected[key]} belongs" for key in wrong[:3]]
    if widths[0] % latent:
        problems.append(f"has {latent} latent channels, which do not divide its width {widths[0]}")
    if problems:
        raise CheckpointError(f"{name} is not a complete HunyuanVideo-1.5 VAE: it {'; it '.join(problems)}.")
    return widths, layers


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _decoder_shapes(widths: tuple[int, ...], resnets: int, latent: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(key: str, out: int, into: int, size: int = 3) -> None:
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (out, into, size, size, size), (out,)

    def resnet(key: str, width: int) -> None:
        for i in (1, 2):
            shapes[f"{key}.norm{i}.gamma"] = (width, 1, 1, 1)
            conv(f"{key}.conv{i}.conv", width, width)

    conv("decoder.conv_in.conv", widths[0], latent)
    for i in range(2):
        resnet(f"decoder.mid_block.resnets.{i}", widths[0])
    shapes["decoder.mid_block.attentions.0.norm.gamma"] = (widths[0], 1, 1, 1)
    for part in ("to_q", "to_k", "to_v", "proj_out"):
        conv(f"decoder.mid_block.attentions.0.{part}", widths[0], widths[0], 1)
    for level, width in enumerate(widths):
        for i in range(resnets):
            resnet(f"decoder.up_blocks.{level}.resnets.{i}", width)
        if level + 1 < len(widths):
            conv(
                f"decoder.up_blocks.{level}.upsamplers.0.conv.conv", widths[level + 1] * (8 if level < 2 else 4), width
            )
    shapes["decoder.norm_out.gamma"] = (widths[-1], 1, 1, 1)
    conv("decoder.conv_out.conv", 3, widths[-1])
    return shapes
