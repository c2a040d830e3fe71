"""Core's HunyuanVideo-1.5 transformer, in a process of its own: `comfy` wants to be set up before it is imported."""

import json
import subprocess
import sys

from set_up import comfyui_path

CODE = """
import json, sys
sys.path.insert(0, sys.argv[1]); sys.argv[1:] = []
import comfy.cli_args
comfy.cli_args.args.cpu = True
import comfy.ops, torch
from comfy.ldm.hunyuan_video.model import HunyuanVideo
with torch.device("meta"):
    model = HunyuanVideo(
        in_channels=65, out_channels=32, vec_in_dim=None, context_in_dim=3584, hidden_size=128, mlp_ratio=4.0,
        num_heads=1, depth=1, depth_single_blocks=0, axes_dim=[16, 56, 56], theta=256, patch_size=[1, 1, 1],
        qkv_bias=True, guidance_embed=False, byt5=True, meanflow=False, use_cond_type_embedding=True,
        vision_in_dim=1152, operations=comfy.ops.disable_weight_init,
    )
print(json.dumps({key: list(value.shape) for key, value in model.state_dict().items()}))
"""


def core_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of core's module, one block and one head wide, by its own names."""
    command = [sys.executable, "-c", CODE, str(comfyui_path())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {key: tuple(shape) for key, shape in json.loads(done.stdout.splitlines()[-1]).items()}
