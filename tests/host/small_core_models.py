"""Write checkpoints with random weights in core's layout: python small_core_models.py COMFYUI MODELS.

Two HunyuanVideo-1.5 transformers with one block of 128 channels each, one for text and image to video and one for super
resolution; and a full-size VAE, because core's VAELoader assumes the full widths.
"""

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

comfyui, models = map(Path, sys.argv[1:])
sys.path.insert(0, str(comfyui))
sys.argv[1:] = []

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.ops  # noqa: E402
from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams  # noqa: E402
from comfy.ldm.hunyuan_video.vae_refiner import Decoder, Encoder  # noqa: E402

NOISE = torch.randn(2**20, generator=torch.Generator().manual_seed(0))


def weights(shapes: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return random weights of these shapes. All repeat the same numbers, which is fast."""
    state = {}
    for key, like in shapes.items():
        if key.endswith(("gamma", "scale", "norm.weight", "norm1.weight", "norm2.weight")):
            state[key] = torch.ones(like.shape, dtype=dtype)
            continue
        gain = 1 / math.sqrt(like[0].numel()) if like.ndim > 1 else 0.02
        count = like.numel()
        state[key] = (NOISE * gain).to(dtype).repeat(-(-count // len(NOISE)))[:count].view(like.shape).clone()
    return state


def transformer(in_channels: int) -> dict[str, torch.Tensor]:
    fields = HunyuanVideoParams.__dataclass_fields__
    with torch.device("meta"):
        model = HunyuanVideo(
            in_channels=in_channels,
            out_channels=32,
            vec_in_dim=None,
            context_in_dim=3584,
            hidden_size=128,
            mlp_ratio=4.0,
            num_heads=1,
            depth=1,
            depth_single_blocks=0,
            axes_dim=[16, 56, 56],
            theta=256,
            patch_size=[1, 1, 1],
            qkv_bias=True,
            guidance_embed=False,
            byt5=True,
            meanflow=False,
            use_cond_type_embedding=True,
            vision_in_dim=1152,
            operations=comfy.ops.disable_weight_init,
            **({"meanflow_sum": False} if "meanflow_sum" in fields else {}),  # ComfyUI 0.33
        )
    return weights(model.state_dict(), torch.float32)


def vae() -> dict[str, torch.Tensor]:
    config = {"in_channels": 3, "out_channels": 3, "num_res_blocks": 2, "z_channels": 32}
    config |= {"block_out_channels": [128, 256, 512, 1024, 1024], "ffactor_spatial": 16, "ffactor_temporal": 4}
    with torch.device("meta"):
        parts = {"encoder": Encoder(**config), "decoder": Decoder(**config)}
    shapes = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    return weights(shapes, torch.float16)


for folder, name, state in (
    ("diffusion_models", "small_t2v", transformer(65)),
    ("diffusion_models", "small_sr", transformer(98)),
    ("vae", "full_size", vae()),
):
    (models / folder).mkdir(parents=True, exist_ok=True)
    save_file(state, models / folder / f"{name}.safetensors")
