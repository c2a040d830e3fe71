"""Samplings with core's own functions and a small HunyuanVideo-1.5 transformer, loaded by core's loader."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.denoise_models import draw_weight

SIZES = {"in_channels": 65, "out_channels": 32, "vec_in_dim": None, "context_in_dim": 3584, "hidden_size": 128}
SIZES |= {"mlp_ratio": 4.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 0, "axes_dim": [16, 56, 56]}
SIZES |= {"theta": 256, "patch_size": [1, 1, 1], "qkv_bias": True, "guidance_embed": False, "byt5": True}
SIZES |= {"meanflow": False, "use_cond_type_embedding": True, "vision_in_dim": 1152}
SHAPE = (32, 3, 4, 6)
"""Channels, frames, height and width of a latent."""


def write_transformer(path: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Write a transformer with random weights as core saves it."""
    import comfy.ops
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

    fields = HunyuanVideoParams.__dataclass_fields__
    sizes = SIZES | changes | ({"meanflow_sum": False} if "meanflow_sum" in fields else {})  # ComfyUI 0.33
    with torch.device("meta"):
        model = HunyuanVideo(**sizes, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(0)
    state = {key: draw_weight(key, like.shape, generator).to(dtype) for key, like in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


def in_scaled_fp8(path: Path, target: Path) -> Path:
    """Write a transformer's file with the blocks' linear layers in scaled 8 bits, as in `fp8_scaled` files."""
    state = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, tensor in load_file(path).items():
        if tensor.ndim == 2 and key.startswith("double_blocks."):
            scale = tensor.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            state |= {key: (tensor / scale).to(torch.float8_e4m3fn), key.replace(".weight", ".scale_weight"): scale}
        else:
            state[key] = tensor
    save_file(state, target)
    return target


def conditioning(seed: int, tokens: int = 7, glyphs: int = 3, videos: int = 1, **entries: object) -> list:
    """Return a CONDITIONING of random text, and glyph text if `glyphs` is not 0."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(videos, tokens, 3584, generator=generator)
    if glyphs:
        entries["conditioning_byt5small"] = torch.randn(videos, glyphs, 1472, generator=generator)
    return [[text, {"pooled_output": torch.zeros(videos, 768), **entries}]]


def latent(videos: int = 1) -> Tensor:
    return torch.zeros(videos, *SHAPE)


def noise(videos: int = 1) -> Tensor:
    return torch.randn(videos, *SHAPE, generator=torch.Generator().manual_seed(5))


def ksample(
    model: object,
    positive: list,
    negative: list,
    *,
    sampler: str = "euler",
    steps: int = 4,
    cfg: float = 6.0,
    videos: int = 1,
    callback: object = None,
) -> Tensor:
    """Sample as the KSampler node does."""
    import comfy.sample

    return comfy.sample.sample(
        model,
        noise(videos),
        steps,
        cfg,
        sampler,
        "simple",
        positive,
        negative,
        latent(videos),
        callback=callback,
        disable_pbar=True,
        seed=5,
    )


def custom_sample(guider: object, steps: int = 4) -> Tensor:
    """Sample as the SamplerCustomAdvanced node does."""
    import comfy.samplers

    patcher = guider.model_patcher
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", steps)
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise(), latent(), sampler, sigmas, disable_pbar=True, seed=5)
