"""Core's HunyuanVideo-1.5 transformer, in a process of its own: `comfy` must be configured before it is imported."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from distributed.denoise.merge import Patch
from set_up import comfyui_path

START = """
import json, sys
sys.path.insert(0, sys.argv[1]); arguments = sys.argv[2:]; sys.argv[1:] = []
import comfy.cli_args
comfy.cli_args.args.cpu = True
import comfy.ops, torch
from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

def make(in_channels=65, width=128, layers=1, meanflow=False, averaged=False, dtype=None):
    fields = HunyuanVideoParams.__dataclass_fields__
    return HunyuanVideo(
        in_channels=in_channels, out_channels=32, vec_in_dim=None, context_in_dim=3584, hidden_size=width,
        mlp_ratio=4.0, num_heads=width // 128, depth=layers, depth_single_blocks=0, axes_dim=[16, 56, 56], theta=256,
        patch_size=[1, 1, 1], qkv_bias=True, guidance_embed=False, byt5=True, meanflow=meanflow,
        use_cond_type_embedding=True, vision_in_dim=1152, operations=comfy.ops.disable_weight_init, dtype=dtype,
        **({"meanflow_sum": not averaged} if "meanflow_sum" in fields else {}),
    )
"""
SHAPES = """
with torch.device("meta"):
    model = make()
print(json.dumps({key: list(value.shape) for key, value in model.state_dict().items()}))
"""
RUN = """
import comfy.lora
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter

ADAPTERS = {
    "lora": (LoRAAdapter, ["up", "down", "alpha", "mid", "dora_scale", "reshape"]),
    "loha": (LoHaAdapter, ["w1_a", "w1_b", "alpha", "w2_a", "w2_b", "t1", "t2", "dora_scale"]),
    "lokr": (LoKrAdapter, ["w1", "w2", "alpha", "w1_a", "w1_b", "w2_a", "w2_b", "t2", "dora_scale"]),
}

def spelled(weights, like):
    return {key if key in like else key.replace("_norm.weight", "_norm.scale"): value for key, value in weights.items()}

def patch(kind, strength, strength_model, tensors, alpha):
    if kind not in ADAPTERS:
        return (strength, (kind, (next(iter(tensors.values())),)), strength_model, None, None)
    adapter, names = ADAPTERS[kind]
    values = tensors | {"alpha": alpha}
    return (strength, adapter(set(), tuple(values.get(name) for name in names)), strength_model, None, None)

@torch.inference_mode()
def forward(model, weights, inputs, sigmas=None, step=0, dtype="float32"):
    dtype = getattr(torch, dtype)
    network = make(**model, dtype=dtype).eval()
    network.load_state_dict(spelled(weights, network.state_dict()))
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    options = {} if sigmas is None else {"sample_sigmas": sigmas, "sigmas": sigmas[step : step + 1]}
    time = sigmas[step] * 1000 if sigmas is not None else torch.tensor(731.0)
    get = inputs.get
    return network._forward(
        get("x"), time.expand(len(get("x"))), get("context"), None, get("txt_byt5"), get("clip_fea"), None,
        get("attention_mask"), None, None, sigmas is None, None, options,
    )

request = torch.load(arguments[0])
results = {}
for name, case in request["forwards"].items():
    weights = request["weights"][case.pop("weights")]
    for key, patches in case.pop("patches", {}).items():
        merged = comfy.lora.calculate_weight([patch(*one) for one in patches], weights[key].clone(), key)
        weights = weights | {key: merged}
    results[name] = forward(weights=weights, **case)
for name, (weight, patches) in request["merges"].items():
    results[name] = comfy.lora.calculate_weight([patch(*one) for one in patches], weight.clone(), name)
torch.save(results, arguments[1])
"""


def _run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", START + code, str(comfyui_path()), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def module_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of core's module, one block and one head wide, by its own names."""
    return {key: tuple(shape) for key, shape in json.loads(_run(SHAPES).splitlines()[-1]).items()}


def run_core(
    folder: Path,
    weights: Mapping[str, object],
    forwards: Mapping[str, Mapping],
    merges: Mapping[str, tuple] | None = None,
) -> dict[str, Tensor]:
    """Compute with core, all in one process.

    weights: state dicts by name. forwards: arguments of `forward` in `RUN`; model: those of `make`; weights: a name;
    patches: `Patch`es by key, which core merges first. merges: (weight, patches), for core's `calculate_weight`.
    """

    def plain(patches: list[Patch]) -> list[tuple]:
        return [(p.kind, p.strength, p.strength_model, dict(p.tensors), p.alpha) for p in patches]

    forwards = {
        name: case | {"patches": {key: plain(patches) for key, patches in case.get("patches", {}).items()}}
        for name, case in forwards.items()
    }
    merges = {name: (weight, plain(patches)) for name, (weight, patches) in (merges or {}).items()}
    torch.save({"weights": dict(weights), "forwards": forwards, "merges": merges}, folder / "request.pt")
    _run(RUN, folder / "request.pt", folder / "results.pt")
    return torch.load(folder / "results.pt")
