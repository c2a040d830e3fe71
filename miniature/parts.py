"""The miniature's trained parts: their sizes, their files, and the pipelines that they make with the encoders.

| part | parameters | in fp16 |
| --- | --- | --- |
| VAE, widths 8, 16, 32, 32, 64 | 3.58 M | 7.2 MB |
| transformer, 4 blocks, 4 heads of 32 | 2.27 M without zeros | 4.6 MB |

One transformer serves text-to-video and image-to-video, because it is trained on both. Half of diffusers' transformer
of this size would be the glyph embedder, whose inner width is 2048 in every configuration. Only its first
`GLYPH_WIDTH` inner channels are used here. The others are zero and stay zero in training, because their gradients are
zero, too. Files do not hold them.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import text

VAE_CONFIG = {"block_out_channels": (8, 16, 32, 32, 64), "layers_per_block": 2}
TRANSFORMER_CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 4,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": text.WIDTH,
    "text_embed_2_dim": text.WIDTH,
    "image_embed_dim": text.WIDTH,
    "rope_axes_dim": (8, 12, 12),
    "target_size": 208,
}
SHIFT, GUIDANCE = 5.0, 6.0
"""Defaults of the sampler."""
GLYPH_WIDTH = 64
"""Inner channels of the glyph embedder that are used."""
WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the trained files."""
VAE_FILE, TRANSFORMER_FILE, SETTINGS_FILE = "vae.safetensors", "transformer.safetensors", "settings.json"


def new_vae(**changes: object) -> AutoencoderKLHunyuanVideo15:
    """Return a VAE whose residual branches start as zero, and whose latents start with little noise.

    On a CPU, 160 small steps of such a VAE reached 19.3 dB, and 18.9 dB from PyTorch's initial weights.
    """
    model = AutoencoderKLHunyuanVideo15(**VAE_CONFIG | changes)
    with torch.no_grad():
        model.encoder.conv_out.conv.bias[model.config.latent_channels :] = -6.0
        for name, weight in model.named_parameters():
            if ".conv2." in name or ".proj_out." in name:
                weight.zero_()
    return model


def new_transformer(**changes: object) -> HunyuanVideo15Transformer3DModel:
    """Return a transformer whose blocks and output start as zero, so that it starts as the identity (Peebles, 2022)."""
    model = HunyuanVideo15Transformer3DModel(**TRANSFORMER_CONFIG | changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("proj_out.") or (".linear." in name and "norm" in name and "refiner" not in name):
                weight.zero_()
            for axis in glyph_axes(name):
                weight.narrow(axis, GLYPH_WIDTH, weight.shape[axis] - GLYPH_WIDTH).zero_()
    return model


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write a model's weights in fp16, without the glyph embedder's zeros."""
    weights = {}
    for name, weight in model.state_dict().items():
        for axis in glyph_axes(name):
            weight = weight.narrow(axis, 0, GLYPH_WIDTH)
        weights[name] = weight.detach().to("cpu", torch.float16).contiguous()
    save_file(weights, path)


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote into a model, whose precision is kept."""
    weights = load_file(path)
    full = {name: torch.zeros_like(weight, device="cpu") for name, weight in model.state_dict().items()}
    for name, weight in weights.items():
        place = full[name]
        for axis in glyph_axes(name):
            place = place.narrow(axis, 0, GLYPH_WIDTH)
        place.copy_(weight)
    model.load_state_dict({name: full[name] for name in weights})


def save_settings(folder: Path, **settings: object) -> None:
    """Write or complete the settings: the parts' configurations."""
    path = folder / SETTINGS_FILE
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | settings, indent=2) + "\n")


def load_vae(folder: Path = WEIGHTS) -> AutoencoderKLHunyuanVideo15:
    """Return the trained VAE, in float32 on the CPU."""
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    model = new_vae(**settings["vae"]).eval().requires_grad_(False)
    load_weights(model, folder / VAE_FILE)
    return model


def pipeline(kind: str, folder: Path = WEIGHTS) -> HunyuanVideo15Pipeline | HunyuanVideo15ImageToVideoPipeline:
    """Return the trained pipeline, "t2v" or "i2v", in float32 on the CPU."""
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    transformer = new_transformer(**settings["transformer"], task_type=kind).eval().requires_grad_(False)
    load_weights(transformer, folder / TRANSFORMER_FILE)
    parts = text.encoders() | {
        "transformer": transformer,
        "vae": load_vae(folder),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        "guider": ClassifierFreeGuidance(guidance_scale=GUIDANCE),
    }
    if kind == "i2v":
        return HunyuanVideo15ImageToVideoPipeline(**parts)
    del parts["image_encoder"], parts["feature_extractor"]
    return HunyuanVideo15Pipeline(**parts)


def glyph_axes(name: str) -> tuple[int, ...]:
    """Return the axes of a weight that are as wide as the glyph embedder's inner channels."""
    return {
        "context_embedder_2.linear_1.weight": (0,),
        "context_embedder_2.linear_1.bias": (0,),
        "context_embedder_2.linear_2.weight": (0, 1),
        "context_embedder_2.linear_2.bias": (0,),
        "context_embedder_2.linear_3.weight": (1,),
    }.get(name, ())


def frames_of(video: Tensor) -> Tensor:
    """Return a decoded video [1, 3, frames, height, width] from -1 to 1 as [frames, height, width, 3] from 0 to 1."""
    return (video[0].float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)
