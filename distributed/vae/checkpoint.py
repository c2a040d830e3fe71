"""Checkpoints of the VAE: which layout a file has, and its decoder's tensors in diffusers' names.

Two layouts hold the same 218 tensors: diffusers' and the original one (Tencent's, Comfy-Org's, core's `get_sd`).
One maps to the other by renaming alone. A layout is recognised by its keys. Every tensor that is needed is checked by
name and shape, so that nothing is ever decoded with a weight that did not come from the file. Other tensors are
ignored, unless they show that the file is another model's. Files are safetensors only.
"""

import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..quoting import printable, quote

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
"""Parts of keys in the original layout and in diffusers'; # is a number, the same in both."""

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
"""A key that tells another model's file, and the model."""

WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names that wrapping a module adds to the keys of its tensors (torch.compile, data parallel, FSDP, checkpointing)."""

FURTHER_BLOCK = re.compile(
    r"decoder\.(mid_block\.(?:resnets|attentions)\.\d+|up_blocks\.\d+\.(?:resnets|upsamplers|attentions)\.\d+)\."
)
"""The part of a key that names a block. A decoder with more blocks than expected is another model's."""

MOST_RESNETS = 16
"""Residual blocks of a level that are believed. HunyuanVideo-1.5 has 3."""

JSON_LIMIT = 16 * 2**20
"""Bytes that are read of a config or an index; real ones have some kilobytes."""

SAMPLES = 64
"""Numbers of each tensor that its fingerprint is taken of."""


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
    """Whether the whole encoder is there, too."""

    @property
    def identity(self) -> str:
        """Changes when the files do."""
        stats = [(path, path.stat()) for path in self.files]
        return "|".join(f"{path}:{s.st_size}:{s.st_mtime_ns}" for path, s in stats)


def to_diffusers(name: str) -> str:
    """A key of either layout in diffusers' naming, without the names of wrappers."""
    return _rename(unwrapped(name), _TO_DIFFUSERS)


def to_core(name: str) -> str:
    """A key of either layout in the original naming, without the names of wrappers."""
    return _rename(unwrapped(name), _TO_CORE)


def unwrapped(name: str) -> str:
    """A key without what wrappers (see `WRAPPERS`) have added to it, wherever it stands."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _rule(old: str, new: str) -> tuple[re.Pattern, str]:
    """What finds `old` (at a key's beginning, unless it begins with a dot) and what to put in its place."""
    pattern = ("" if old.startswith(".") else "^") + re.escape(old).replace(re.escape("#"), r"(\d+)")
    numbers = itertools.count(1)
    return re.compile(pattern), re.sub("#", lambda _: f"\\{next(numbers)}", new)


_TO_DIFFUSERS = [_rule(core, diffusers) for core, diffusers in LAYOUTS]
_TO_CORE = [_rule(diffusers, core) for core, diffusers in LAYOUTS]


def _rename(name: str, rules: list[tuple[re.Pattern, str]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def open_checkpoint(path: str | os.PathLike, *, encoder: bool = False) -> Checkpoint:
    """Recognise and check a VAE: a .safetensors file of either layout, or a diffusers folder.

    encoder: refuse a VAE without its encoder as well. Tensors that are not needed are ignored. Raises CheckpointError
    with what is wrong, FileNotFoundError where there is nothing.
    """
    files = _files(Path(path))
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for file in files:
        with _open(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  not a mapping
                header = tensors.get_slice(key)
                shapes[key], dtypes[key] = tuple(header.get_shape()), header.get_dtype()
    name = "The VAE" if _is_handed_over(Path(path)) else printable(Path(path).name)
    layout = _layout(shapes, name)
    keys = _by_diffusers_name(shapes, name)
    shapes, dtypes = {n: shapes[key] for n, key in keys.items()}, {n: dtypes[key] for n, key in keys.items()}
    widths, resnets, latent = _sizes(shapes, name)
    usable = {key: _DTYPES.get(dtype, dtype) for key, dtype in dtypes.items()}
    _check(_decoder_shapes(widths, resnets, latent), shapes, usable, name)
    encoder_shapes = _encoder_shapes(tuple(reversed(widths)), resnets - 1, latent)
    if encoder:
        if not encoder_shapes.keys() & shapes.keys():
            raise CheckpointError(f"{name} is not a complete HunyuanVideo-1.5 VAE: it has a decoder alone.")
        _check(encoder_shapes, shapes, usable, name)
    return Checkpoint(
        files,
        layout,
        latent,
        tuple(reversed(widths)),
        resnets - 1,
        usable["decoder.conv_in.conv.weight"],
        has_encoder=encoder or not _problems(encoder_shapes, shapes, usable),
    )


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def decoder_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The decoder's tensors, mapped from the file, in diffusers' names without "decoder."."""
    found = all_tensors(checkpoint)
    return {key.removeprefix("decoder."): value for key, value in found.items() if key.startswith("decoder.")}


def all_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The decoder's tensors and the encoder's, if there is one, mapped from the file, in diffusers' names."""
    sizes = checkpoint.layers_per_block, checkpoint.latent_channels
    needed = _decoder_shapes(tuple(reversed(checkpoint.block_out_channels)), sizes[0] + 1, sizes[1])
    if checkpoint.has_encoder:
        needed |= _encoder_shapes(checkpoint.block_out_channels, *sizes)
    found: dict[str, Tensor] = {}
    for file in checkpoint.files:
        with _open(file) as tensors:
            names = {key: to_diffusers(key) for key in tensors.keys()}  # noqa: SIM118
            found |= {name: tensors.get_tensor(key) for key, name in names.items() if name in needed}
    return found


def share_state_dict(state_dict: Mapping[str, Tensor], folder: str | os.PathLike, name: str = "vae") -> Path:
    """Hand over weights that exist only in memory: write their decoder once, for all ranks of a host to map.

    Either layout. Returns the file, readable by its owner alone. Raises CheckpointError as `open_checkpoint` does.
    """
    decoder = {key: tensor.detach().to("cpu").contiguous() for key, tensor in _decoder(state_dict).items()}
    path = Path(folder) / f"{name}.safetensors"
    # Made before it is filled: at no time may others read it.
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o600))
    try:
        save_file(decoder, path)
    except SafetensorError as error:
        raise OSError(f"The VAE cannot be handed over to the ranks: {error}") from error
    path.chmod(0o600)
    return path


class SharedWeights:
    """Weights in memory, written to a file for ranks to map. `mark` says which they are (see `fingerprint`).

    The file goes with this object, at the latest with this process, for on Linux it has no name. Ranks that have mapped
    it keep what they have. Raises CheckpointError as `open_checkpoint` does.
    """

    def __init__(self, weights: Mapping[str, Tensor], mark: str) -> None:
        self.mark = mark
        folder = tempfile.TemporaryDirectory(prefix="hv15-vae-")
        remove = weakref.finalize(self, folder.cleanup)
        try:
            self.path = share_state_dict(weights, folder.name)
        except BaseException:
            remove()
            raise
        if sys.platform == "linux":
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            remove()
            self.path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
            weakref.finalize(self, os.close, descriptor)


def check_state_dict(state_dict: Mapping[str, Tensor]) -> str:
    """The layout of weights in memory. Raises CheckpointError as `open_checkpoint` does, for their decoder alone."""
    _decoder(state_dict)
    return _layout({key: tuple(tensor.shape) for key, tensor in state_dict.items()}, "The VAE")


def _decoder(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the decoder needs, checked, in diffusers' names."""
    odd = [key for key, tensor in state_dict.items() if not (isinstance(key, str) and isinstance(tensor, Tensor))]
    if odd:
        raise CheckpointError(f"The VAE is not a state dict: {quote(odd[0])} is not the name of a tensor.")
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    _layout(shapes, "The VAE")
    keys = _by_diffusers_name(shapes, "The VAE")
    shapes = {name: shapes[key] for name, key in keys.items()}
    widths, resnets, latent = _sizes(shapes, "The VAE")
    needed = _decoder_shapes(widths, resnets, latent)
    _check(needed, shapes, {name: state_dict[key].dtype for name, key in keys.items()}, "The VAE")
    decoder = {name: state_dict[keys[name]] for name in needed}
    empty = [name for name, tensor in decoder.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(f"The VAE was not loaded: its {quote(keys[empty[0]])} holds no numbers (meta device).")
    return decoder


def _is_handed_over(path: Path) -> bool:
    """Whether this is an open file of a process of ours (see `SharedWeights`), which has no name to go by."""
    return re.fullmatch(r"/proc/\d+/fd/\d+", str(path)) is not None


INDEX = ".safetensors.index.json"
DIFFUSERS_CLASS = "AutoencoderKLHunyuanVideo15"


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Some numbers of every tensor that the decoder needs: cheap, and the same wherever the weights are moved.

    The weights may be on several devices. Raises CheckpointError for what `check_state_dict` refuses, and where the
    numbers show that a tensor was never loaded: core only warns of keys that a file lacks, which is all of a
    diffusers-layout file's, and leaves the memory as it found it.
    """
    decoder = dict(sorted(_decoder(weights).items()))
    samples = {key: t.detach().flatten()[:: max(1, t.numel() // SAMPLES)].float() for key, t in decoder.items()}
    numbers = _on_cpu(samples)
    for key, values in numbers.items():
        empty = key.endswith((".weight", ".gamma")) and not values.any() and not decoder[key].any()
        if empty or not values.isfinite().all():
            raise CheckpointError(
                f"The VAE was not loaded completely: its {quote(key)} is {'all zeros' if empty else 'not finite'}. "
                "ComfyUI's own loader does not read diffusers' layout; load the file with Load HunyuanVideo-1.5 VAE."
            )
    return hashlib.sha256(torch.cat(list(numbers.values())).numpy().tobytes()).hexdigest()


def _on_cpu(samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, in one copy for each device."""
    moved: dict[str, Tensor] = {}
    for device in {tensor.device for tensor in samples.values()}:
        here = {key: tensor for key, tensor in samples.items() if tensor.device == device}
        numbers = torch.cat(list(here.values())).cpu().split([len(tensor) for tensor in here.values()])
        moved |= zip(here, numbers, strict=True)
    return {key: moved[key] for key in samples}


def _files(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        _check_class(folder)
        index = folder / f"diffusion_pytorch_model{INDEX}"
        if index.is_file():
            return _parts(index)
        file = folder / "diffusion_pytorch_model.safetensors"
        if file.is_file():
            return (file,)
        others = sorted(folder.glob("*.safetensors"))
        if len(others) == 1:  # a variant, such as diffusion_pytorch_model.fp16.safetensors
            return (others[0],)
        raise CheckpointError(f"The folder {printable(folder.name)} has no {file.name}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {printable(path.name)}.")
    if path.name.endswith(INDEX):
        return _parts(path)
    if path.suffix != ".safetensors" and not _is_handed_over(path):
        raise CheckpointError(
            f"{printable(path.name)} is not a .safetensors file; other formats can run code and are not read."
        )
    return (path,)


def _check_class(folder: Path) -> None:
    """Some models share this one's keys and shapes; a diffusers folder says which model it is."""
    config = folder / "config.json"
    if config.is_file():
        found = _json(config).get("_class_name", DIFFUSERS_CLASS)
        if found != DIFFUSERS_CLASS:
            model = quote(found) if isinstance(found, str) else "model without a class name"
            raise CheckpointError(
                f"The folder {printable(folder.name)} holds a {model}, not HunyuanVideo-1.5's {DIFFUSERS_CLASS}."
            )


def _parts(index: Path) -> tuple[Path, ...]:
    """The files that an index lists, all of them beside it."""
    parts = _json(index).get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
        raise CheckpointError(f"{printable(index.name)} has no weight_map that names the files.")
    files = tuple(index.parent / Path(part).name for part in sorted(set(parts.values())))
    missing = [file.name for file in files if file.suffix != ".safetensors" or not _is_file(file)]
    if missing:
        raise CheckpointError(f"{printable(index.name)} names files that are not there: {_some(missing)}.")
    return files


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _json(path: Path) -> dict:
    name = printable(path.name)
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{name} has more than {JSON_LIMIT / 2**20:g} MiB; it is no config or index.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{name} cannot be read as JSON: {printable(error)}") from error
    except RecursionError as error:
        raise CheckpointError(f"{name} cannot be read as JSON: it is nested too deeply.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} holds no JSON object.")
    return found


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{printable(file.name)} cannot be read as safetensors ({printable(error)}). "
            "It may be truncated, or a renamed file of another format."
        ) from error


def _layout(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
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
    raise CheckpointError(f"{name} is not a HunyuanVideo-1.5 VAE: it holds {_some(sorted(shapes)) or 'nothing'}.")


def _by_diffusers_name(keys: Iterable[str], name: str) -> dict[str, str]:
    """The keys by their names in diffusers' layout."""
    found: dict[str, str] = {}
    for key in keys:
        other = found.setdefault(to_diffusers(key), key)
        if other != key:
            raise CheckpointError(f"{name} holds the same tensor twice, as {quote(other)} and as {quote(key)}.")
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


def _sizes(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[tuple[int, ...], int, int]:
    """The widths, deepest first, the residual blocks of a level and the latent channels, read off the shapes."""

    def number(pattern: str) -> int:
        return len({match[1] for key in shapes if (match := re.match(pattern, key))})

    levels = number(r"decoder\.up_blocks\.(\d+)\.")
    resnets = number(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.")
    if levels != 5:
        raise CheckpointError(f"{name} has {levels} decoder levels; HunyuanVideo-1.5 has 5.")
    if not 1 <= resnets <= MOST_RESNETS:
        raise CheckpointError(f"{name} has {resnets} residual blocks in a decoder level; HunyuanVideo-1.5 has 3.")
    firsts = (shapes.get(f"decoder.up_blocks.{i}.resnets.0.conv1.conv.weight", ()) for i in range(levels))
    widths = tuple(first[0] if first else 0 for first in firsts)
    latent = shapes["decoder.conv_in.conv.weight"][1]
    if 0 in widths:
        raise CheckpointError(f"{name} has decoder levels of widths {list(widths)}; none may be empty.")
    if latent < 1 or widths[0] % latent:
        raise CheckpointError(
            f"{name} has {latent} latent channels, which do not divide the width of its decoder, {widths[0]}."
        )
    return widths, resnets, latent


def _check(expected: "Shapes", shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, object], name: str) -> None:
    """Raise CheckpointError unless all expected tensors are there, and no block of the decoder beside them."""
    if problems := _problems(expected, shapes, dtypes):
        raise CheckpointError(f"{name} is not a complete HunyuanVideo-1.5 VAE: it {'; it '.join(problems)}.")
    blocks = {match[1] for key in expected if (match := FURTHER_BLOCK.match(key))}
    if any(key.startswith("decoder.") for key in expected):
        further = [key for key in shapes if (match := FURTHER_BLOCK.match(key)) and match[1] not in blocks]
        if further:
            raise CheckpointError(
                f"{name} is not a HunyuanVideo-1.5 VAE: its decoder has more blocks ({_some(sorted(further))})."
            )


def _problems(expected: "Shapes", shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, object]) -> list[str]:
    """What is wrong with the expected tensors: missing, of another shape or of a dtype that cannot be used."""
    missing = sorted(expected.keys() - shapes.keys())
    there = [key for key in expected if key in shapes]
    wrong = [key for key in there if expected[key] != shapes[key]]
    unusable = [key for key in there if dtypes[key] not in _DTYPES.values()]
    problems = [f"lacks {_some(missing)}"] * bool(missing)
    problems += [f"has {quote(key)} of shape {shapes[key]} where {expected[key]} belongs" for key in wrong[:3]]
    problems += [
        f"has {quote(key)} as {dtypes[key]}; float32, bfloat16 and float16 can be used" for key in unusable[:1]
    ]
    return problems


def _some(keys: list[str]) -> str:
    return ", ".join(map(quote, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


Shapes = dict[str, tuple[int, ...]]


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
    for part in ("to_q", "to_k", "to_v", "proj_out"):
        _conv(shapes, f"{key}.attentions.0.{part}", width, width, 1)


def _decoder_shapes(widths: tuple[int, ...], resnets: int, latent: int) -> Shapes:
    """widths: deepest first. The first two upsamplers double time as well."""
    shapes: Shapes = {}
    _conv(shapes, "decoder.conv_in.conv", widths[0], latent)
    _middle(shapes, "decoder.mid_block", widths[0])
    for level, width in enumerate(widths):
        for i in range(resnets):
            _resnet(shapes, f"decoder.up_blocks.{level}.resnets.{i}", width)
        if level + 1 < len(widths):
            out = widths[level + 1] * (8 if level < 2 else 4)
            _conv(shapes, f"decoder.up_blocks.{level}.upsamplers.0.conv.conv", out, width)
    shapes["decoder.norm_out.gamma"] = (widths[-1], 1, 1, 1)
    _conv(shapes, "decoder.conv_out.conv", 3, widths[-1])
    return shapes


def _encoder_shapes(widths: tuple[int, ...], resnets: int, latent: int) -> Shapes:
    """widths: highest resolution first. The last two downsamplers halve time as well."""
    shapes: Shapes = {}
    _conv(shapes, "encoder.conv_in.conv", widths[0], 3)
    for level, width in enumerate(widths):
        for i in range(resnets):
            _resnet(shapes, f"encoder.down_blocks.{level}.resnets.{i}", width)
        if level + 1 < len(widths):
            out = widths[level + 1] // (8 if level >= 2 else 4)
            _conv(shapes, f"encoder.down_blocks.{level}.downsamplers.0.conv.conv", out, width)
    _middle(shapes, "encoder.mid_block", widths[-1])
    shapes["encoder.norm_out.gamma"] = (widths[-1], 1, 1, 1)
    _conv(shapes, "encoder.conv_out.conv", 2 * latent, widths[-1])
    return shapes
