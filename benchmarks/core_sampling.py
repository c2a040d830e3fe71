"""Measure samplings in a graph of ComfyUI's own nodes: with core's model, and with the same model on ranks.

    python -m benchmarks.core_sampling

A ComfyUI process (COMFYUI_PATH, or .comfyui) loads a full-size transformer file with random float16 weights, as core
saves it, and samples with core's guider and sampler: with core's own model on one GPU, with core's MultiGPU CFG Split
on two if this ComfyUI has it, and with Distribute Model on one rank and on all GPUs. Each samples with guidance and
without. The prompts differ in length, as real ones do. A node of the benchmark's own makes the conditioning, so no text
encoder is needed. The first sampling of a variant includes loading. Later ones are measured with another seed, and with
a LoRA of rank 16 on all linear layers of the blocks, whose strength is then changed. Each row has the seconds of the
sampler node, the seconds per step, the memory on each GPU, and the relative L2 difference of the latent to core's.
Without a GPU the model and the latent are small, and the run is only a functional test. Writes JSON and a Markdown
table.
"""

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.core_graph import (
    Highest,
    device_lists,
    free,
    memory_in_use,
    new_report,
    parser_for,
    run_prompt,
    running_host,
    write,
)
from benchmarks.decode import ROOT, is_wanted, target
from benchmarks.random_weights import random_tensors
from distributed.denoise.layout import Architecture
from distributed.denoise.weights import core_shapes
from distributed.safetensors_files import Shapes

sys.path.append(str(ROOT / "scripts"))
from comfyui_host import Host, node

SIZES = {"64x96x9": (96, 64, 9), "480x848x33": (848, 480, 33), "480x848x121": (848, 480, 121)}
SIZES["720x1280x121"] = (1280, 720, 121)
"""Width, height and frames."""
SMALL = Architecture(heads=1, layers=2)
TOKENS = {"positive": 100, "negative": 60}
LORA_RANK = 16
CONDITIONING = """
import torch

class RandomConditioning:
    CATEGORY, FUNCTION, RETURN_TYPES = "benchmark", "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"tokens": ("INT", {"default": 100})}}

    def make(self, tokens):
        text = torch.randn(1, tokens, 3584, generator=torch.Generator().manual_seed(tokens))
        return ([[text, {"pooled_output": torch.zeros(1, 768)}]],)

NODE_CLASS_MAPPINGS = {"RandomConditioning": RandomConditioning}
"""


def file_shapes(architecture: Architecture) -> Shapes:
    """Return the shapes of a transformer's tensors by keys of core's layout that all versions of ComfyUI load.

    ComfyUI 0.3.75 knows the norms of queries and keys as "scale" only; newer versions accept both.
    """
    shapes = core_shapes(architecture)
    return {re.sub(r"(query|key)_norm\.weight$", r"\1_norm.scale", key): shape for key, shape in shapes.items()}


def random_transformer(architecture: Architecture, device: torch.device) -> dict[str, Tensor]:
    """Return random float16 weights in core's layout that preserve the variance of activations, on the device."""
    return random_tensors(file_shapes(architecture), device, torch.float16)


def random_lora(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a LoRA of LORA_RANK for all linear layers of the blocks, in the names that core's loader reads."""
    generator, state = torch.Generator().manual_seed(1), {}
    for key, weight in weights.items():
        if key.startswith("double_blocks.") and weight.ndim == 2 and "_mod." not in key:
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            for part, shape in (("up", (len(weight), LORA_RANK)), ("down", (LORA_RANK, weight.shape[1]))):
                state[f"{name}.lora_{part}.weight"] = (torch.randn(shape, generator=generator) / shape[1] ** 0.5).half()
    return state


def graph(variant: str, devices: str, size: str, steps: int, cfg: float, seed: int, strength: float | None) -> dict:
    """Return a prompt that samples and saves the latent. strength: of the LoRA, or None."""
    width, height, frames = SIZES[size]
    prompt = {
        "unet": node("UNETLoader", unet_name="full.safetensors", weight_dtype="default"),
        "positive": node("RandomConditioning", tokens=TOKENS["positive"]),
        "negative": node("RandomConditioning", tokens=TOKENS["negative"]),
        "latent": node("EmptyHunyuanVideo15Latent", width=width, height=height, length=frames, batch_size=1),
    }
    model = ["unet", 0]
    if strength is not None:
        prompt["lora"] = node("LoraLoaderModelOnly", model=model, lora_name="full.safetensors", strength_model=strength)
        model = ["lora", 0]
    if variant == "MultiGPU CFG Split":
        prompt["split"] = node("MultiGPU_WorkUnits", model=model, max_gpus=2)
        model = ["split", 0]
    elif variant == "Distribute Model":
        options = {"backend": "auto", "dtype": "auto", "keep_loaded": "keep", "start_timeout": 180}
        prompt["ranks"] = node("HV15RankGroup", devices=devices, stall_timeout=300, **options)
        prompt["distributed"] = node("HV15DistributeModel", model=model, rank_group=["ranks", 0], memory=0.0)
        model = ["distributed", 0]
    return prompt | {
        "shift": node("ModelSamplingSD3", model=model, shift=7.0),
        "guider": node("CFGGuider", model=["shift", 0], positive=["positive", 0], negative=["negative", 0], cfg=cfg),
        "noise": node("RandomNoise", noise_seed=seed),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["shift", 0], scheduler="simple", steps=steps, denoise=1.0),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="sampled"),
    }


def measure(
    host: Host, expected: dict, variant: str, devices: str, size: str, steps: int, lora: bool
) -> Iterator[dict]:
    """Yield the rows of one variant. expected: core's latents by settings, which core's rows add to."""
    series = [("first, guidance", 6.0, 1, None), ("guidance", 6.0, 2, None), ("no guidance", 1.0, 3, None)]
    if lora:
        series += [("LoRA", 6.0, 4, 0.5), ("LoRA, changed strength", 6.0, 5, 0.8), ("LoRA removed", 6.0, 6, None)]
    for name, cfg, seed, strength in series:
        before = memory_in_use()
        with Highest() as highest:
            run = run_prompt(host, graph(variant, devices, size, steps, cfg, seed, strength))
        latent = load_file(host.saved(run.outputs["save"]["latents"][0]))["latent_tensor"]
        reference = expected.setdefault((size, name), latent)
        seconds = run.seconds["sample"]
        yield {
            "size": size,
            "variant": variant,
            "devices": devices,
            "prompt": name,
            "seconds": round(seconds, 2),
            "per_step": round(seconds / steps, 3),
            "before_gib": before,
            "highest_gib": highest.gib,
            "difference": float(f"{float((latent - reference).norm() / reference.norm()):.2g}"),
        }


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--variants", default="", help="only the variants whose name contains one of these words")
    options = parser.parse_args()
    device, _, _ = target(0)
    count, (one, every) = torch.cuda.device_count(), device_lists()
    sizes = (options.sizes or ("480x848x33,480x848x121" if count else "64x96x9")).split(",")
    report = new_report(f"python -m benchmarks.core_sampling --sizes {','.join(sizes)} --steps {options.steps}", device)
    with tempfile.TemporaryDirectory(prefix="hv15-core-sampling-") as folder:
        base = Path(folder)
        weights = random_transformer(Architecture() if count else SMALL, device)
        for kind, tensors in (("diffusion_models", weights), ("loras", random_lora(weights))):
            (base / "models" / kind).mkdir(parents=True)
            save_file(tensors, base / "models" / kind / "full.safetensors")
        del weights, tensors
        torch.cuda.empty_cache()
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes" / "random_conditioning.py").write_text(CONDITIONING)
        with running_host(base, options.host_options) as host:
            variants = [("core", one), ("Distribute Model", one), ("Distribute Model", every)]
            if count > 1 and "MultiGPU_WorkUnits" in host.get("/object_info"):
                variants.insert(1, ("MultiGPU CFG Split", "2 GPUs"))
            variants = [variant for variant in variants if is_wanted(variant[0], options.variants)]
            expected: dict = {}
            for size in sizes:
                for variant, devices in variants:
                    for row in measure(host, expected, variant, devices, size, options.steps, lora=size == sizes[0]):
                        print(row, flush=True)
                        report["rows"].append(row)
                    write(report, options.out, "core-sampling", "seconds of the sampler node, GiB in use on each GPU")
                    free(host)
                    host.stop_groups()


if __name__ == "__main__":
    main()
