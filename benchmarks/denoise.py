"""Measure forwards of the denoising transformer in one run: this project's, other implementations', and the floor.

    python -m benchmarks.denoise                                   one device
    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.denoise    two devices of one host

Weights are random, full size on a GPU and small on the CPU, where the run is only a functional test. A forward has one
prompt of 100 valid text tokens, no glyphs and no image; implementations that pad the prompt get it padded. Every
variant runs once to warm up and then `--repeat` times; the best time is reported. The floor is the number of FLOPs of
our forward, counted by PyTorch, divided by the rate of a matrix product that runs for two seconds in the same run.

On several devices there are two variants: one forward whose sequence is divided between all ranks, and a step with
guidance, which is two forwards in the layout of `distributed.denoise.parallel.plan`. On one device the other
implementations are measured if they are installed: diffusers, and ComfyUI's own model (COMFYUI_PATH or .comfyui) with
either cuDNN's or the flash attention kernel first. Rank 0 writes JSON and a Markdown table.

With `--memory-gib 16,8` a rank's task is measured instead, without a limit and with each of these (`denoise_memory`).
"""

import argparse
import datetime
import gc
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import HunyuanVideo15Transformer3DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.decode import COMFYUI, ROOT, SIZES, is_wanted, join, largest, machine, matmul_rate, measure, versions
from benchmarks.denoise_memory import SMALL as SMALL_TASK
from benchmarks.denoise_memory import TaskSteps, random_transformer
from benchmarks.random_weights import random_tensor
from distributed.denoise import fused
from distributed.denoise.conditions import Condition
from distributed.denoise.layout import Architecture
from distributed.denoise.parallel import Layout, plan
from distributed.denoise.share import Share, window_elements
from distributed.denoise.transformer import Transformer
from distributed.denoise.window import Windows
from distributed.errors import OutOfMemory

FULL: dict = {}
"""diffusers' defaults are the full sizes."""
SMALL = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "rope_axes_dim": (4, 6, 6)}
SMALL |= {"text_embed_dim": 32, "text_embed_2_dim": 32, "image_embed_dim": 32}

TEXT, PADDED, GLYPHS, IMAGE = 100, 1000, 256, 729
"""Valid text tokens, and the lengths to which diffusers' pipeline pads text, glyphs and image."""

COLUMNS = {"peak_gib": "peak GiB", "first_s": "first call", "difference": "difference"}
TASK_COLUMNS = {
    "load_s": "load",
    "new_timestep_s": "with a new timestep",
    "return_s": "return after release",
    "on_device": "weights on the device",
}
"""Columns of the table, by their keys in a row."""

Forward = Callable[[], Tensor]


@torch.no_grad()
def random_weights(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Give a model on the meta device seeded weights that preserve the variance of activations."""
    # The `to` of diffusers warns about layers that this model does not have.
    torch.nn.Module.to(model, dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        weight.copy_(random_tensor(name, weight.shape, generator, dtype))
    return model.eval().requires_grad_(False)


class Inputs:
    """The inputs of a forward at one size, trimmed and padded."""

    def __init__(self, config: object, size: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.latent = draw(config.in_channels, *size)
        self.timestep = torch.full((1,), 731.0, device=device, dtype=dtype)
        self.text = draw(TEXT, config.text_embed_dim)
        self.glyphs, self.image = draw(0, config.text_embed_2_dim), draw(0, config.image_embed_dim)

    def padded(self) -> dict[str, Tensor]:
        """Return the arguments of diffusers' forward, padded as in its pipeline."""
        text = self.text.new_zeros(1, PADDED, self.text.shape[1])
        text[0, :TEXT] = self.text
        mask = self.text.new_zeros(1, PADDED)
        mask[0, :TEXT] = 1
        return {
            "hidden_states": self.latent[None],
            "timestep": self.timestep,
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": text.new_zeros(1, GLYPHS, self.glyphs.shape[1]),
            "encoder_attention_mask_2": mask.new_zeros(1, GLYPHS),
            "image_embeds": text.new_zeros(1, IMAGE, self.image.shape[1]),
        }


def ours(
    model: torch.nn.Module, inputs: Inputs, branches: int = 1, group: Callable[[Layout], dict] = lambda _: {}
) -> Forward:
    """Return our forward, or the two of a step, divided between all ranks. Conditions are encoded beforehand."""
    transformer = Transformer(model)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    t, h, w = transformer.grid(inputs.latent)
    layout = plan(world, branches, t * h * w, transformer.heads, transformer.head_dim)
    groups, context = group(layout), transformer.encode(Condition(inputs.text, inputs.glyphs, inputs.image))
    split = layout.branches[layout.of(rank)[0]]
    elements = window_elements(split, context.tokens, transformer.head_dim)
    window = Windows(inputs.latent.device).of_group(split.ranks, groups.get(split.ranks), elements, inputs.latent.dtype)

    def forward() -> Tensor:
        (modulation,) = transformer.modulation(inputs.timestep)
        for branch in layout.of(rank):
            split = layout.branches[branch]
            share = Share(split, split.ranks.index(rank), groups.get(split.ranks), window)
            rows = transformer.forward(inputs.latent, inputs.timestep, context, modulation, share).cpu()
        return rows if world > 1 else transformer.unpatchify(rows, inputs.latent)

    return forward


def diffusers(model: torch.nn.Module, inputs: Inputs) -> Forward:
    arguments = inputs.padded()
    return lambda: model(**arguments, return_dict=False)[0][0].cpu()


def plain(model: torch.nn.Module, inputs: Inputs) -> Forward:
    """Return our forward with the plain kernels, as on machines without Triton."""
    forward = ours(model, inputs)

    def without_triton() -> Tensor:
        kernels, fused._kernels = fused._kernels, lambda x: None
        try:
            return forward()
        finally:
            fused._kernels = kernels

    return without_triton


def core_model(config: object, device: torch.device, dtype: torch.dtype) -> torch.nn.Module | None:
    """Return ComfyUI's transformer with random weights of the same sizes, or None if there is no ComfyUI."""
    if not (COMFYUI / "comfy").is_dir():
        print(f"No ComfyUI at {COMFYUI}: its model is not measured. Set COMFYUI_PATH.")
        return None
    sys.path.append(str(COMFYUI))
    from comfy.cli_args import args

    args.cpu = device.type == "cpu"
    import comfy.ops
    from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams

    fields = HunyuanVideoParams.__dataclass_fields__
    with torch.device("meta"):
        model = HunyuanVideo(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            vec_in_dim=None,
            context_in_dim=config.text_embed_dim,
            hidden_size=config.num_attention_heads * config.attention_head_dim,
            mlp_ratio=config.mlp_ratio,
            num_heads=config.num_attention_heads,
            depth=config.num_layers,
            depth_single_blocks=0,
            axes_dim=list(config.rope_axes_dim),
            theta=config.rope_theta,
            patch_size=[1, 1, 1],
            qkv_bias=True,
            guidance_embed=False,
            byt5=True,
            meanflow=False,
            use_cond_type_embedding=True,
            vision_in_dim=config.image_embed_dim,
            dtype=dtype,
            operations=comfy.ops.disable_weight_init,
            **({"meanflow_sum": False} if "meanflow_sum" in fields else {}),  # ComfyUI 0.33
        )
    return random_weights(model, device, dtype)


def core(model: torch.nn.Module, inputs: Inputs, first: SDPBackend) -> Forward:
    """Return ComfyUI's forward with the attention kernel `first` preferred."""
    import comfy.ops

    kernels = [first, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    kernels = list(dict.fromkeys([*kernels, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]))
    own_order = getattr(comfy.ops, "SDPA_BACKEND_PRIORITY", [])  # ComfyUI 0.33 applies it around each call

    def forward() -> Tensor:
        own_order[:] = kernels
        with sdpa_kernel(kernels, set_priority=True):
            return model(inputs.latent[None], inputs.timestep, inputs.text[None])[0].cpu()

    return forward


def count_flops(config: dict, size: tuple[int, int, int]) -> int:
    """Return the FLOPs of our forward: matrix products and attention, two per multiply-add."""
    meta = torch.device("meta")
    with meta:
        model = HunyuanVideo15Transformer3DModel(**config)
    inputs, transformer = Inputs.__new__(Inputs), Transformer(model)
    inputs.latent = torch.empty(model.config.in_channels, *size, device=meta)
    timestep = torch.empty(1, device=meta)
    widths = model.config.text_embed_dim, model.config.text_embed_2_dim, model.config.image_embed_dim
    condition = Condition(*(torch.empty(n, width, device=meta) for n, width in zip((TEXT, 0, 0), widths, strict=True)))
    with FlopCounterMode(display=False) as counter:
        (modulation,) = transformer.modulation(timestep)
        transformer.forward(inputs.latent, timestep, transformer.encode(condition), modulation)
    return counter.get_total_flops()


def make_groups(layout: Layout) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """Create the process groups of a layout. A collective."""
    return {ranks: dist.new_group(ranks) for ranks in layout.groups if len(ranks) > 1}


def variants(world: int) -> dict[str, Callable]:
    """Return the variants by name: functions from a model and inputs to a forward."""
    if world > 1:
        return {
            "ours, one forward": lambda model, inputs: ours(model, inputs, 1, make_groups),
            "ours, step with guidance": lambda model, inputs: ours(model, inputs, 2, make_groups),
        }
    return {
        "diffusers": diffusers,
        "ours": ours,
        "ours without Triton": plain,
        "ours, step with guidance": lambda model, inputs: ours(model, inputs, 2),
        "ComfyUI, cuDNN first": lambda model, inputs: core(model, inputs, SDPBackend.CUDNN_ATTENTION),
        "ComfyUI, flash first": lambda model, inputs: core(model, inputs, SDPBackend.FLASH_ATTENTION),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default=None, help="comma-separated, of: " + ", ".join(SIZES))
    parser.add_argument("--variants", default="", help="only the variants whose name contains one of these words")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--memory-gib", default="", help="measure a rank's task without and with these limits per rank")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    dtype, config = (torch.bfloat16, FULL) if cuda else (torch.float32, SMALL)
    rank, world = join(device)
    sizes = (options.sizes or ("480x848x33,480x848x121,720x1280x121" if cuda else "64x96x9")).split(",")
    chosen = {name: build for name, build in variants(world).items() if is_wanted(name, options.variants)}

    report = {
        "machine": machine(device),
        "ranks": world,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "dtype": str(dtype).removeprefix("torch."),
        "command": f"python -m benchmarks.denoise --repeat {options.repeat} --sizes {','.join(sizes)}",
        "matmul_sustained_tflops": round(matmul_rate(device, dtype, 2) / 1e12, 2),
        "results": [{"size": size, "variants": {}} for size in sizes],
    }
    for result in report["results"]:
        flops = count_flops(config, SIZES[result["size"]])
        result["tflop"] = round(flops / 1e12, 1)
        floor = flops / world / 1e12 / report["matmul_sustained_tflops"]
        result["variants"]["floor"] = {"best_s": round(floor, 3)}
    references: dict[str, Tensor] = {}
    if options.memory_gib:
        report["command"] += f" --memory-gib {options.memory_gib}"
        limits = [None, *map(float, options.memory_gib.split(","))]
        measure_limits(report, limits, device, dtype, options.repeat, options.out)
        chosen = {}
    with torch.inference_mode():
        for of_core in (False, True):  # one model on the device at a time
            builds = {name: build for name, build in chosen.items() if name.startswith("ComfyUI") == of_core}
            if not builds:
                continue
            with torch.device("meta"):
                model = HunyuanVideo15Transformer3DModel(**config)
            model_config = model.config
            model = core_model(model_config, device, dtype) if of_core else random_weights(model, device, dtype)
            if model is None:
                continue
            for result in report["results"]:
                for name, build in builds.items():
                    forward = build(model, Inputs(model_config, SIZES[result["size"]], device, dtype))
                    row = measure_forward(device, forward, options.repeat, references, result["size"], of_core)
                    result["variants"][name] = row
                    if rank == 0:
                        print(result["size"], name, row, flush=True)
                        write(report, options.out)  # an interrupted run keeps its rows
            del model, forward
            gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def measure_limits(
    report: dict, limits: list[float | None], device: torch.device, dtype: torch.dtype, repeat: int, folder: Path
) -> None:
    """Measure a rank's task without a limit and with limits in GiB. A collective."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    config = Architecture() if device.type == "cuda" else SMALL_TASK
    transformer = random_transformer(config, device, dtype) if rank == 0 else None
    references: dict[str, Tensor] = {}
    for result in report["results"]:
        for limit in limits:
            memory = None if limit is None else int(limit * 2**30)
            steps = TaskSteps(transformer, SIZES[result["size"]], TEXT, memory, device, dtype)
            try:
                loads = {"load_s": steps.load()}
                row = measure_forward(device, steps.step, repeat, references, result["size"], False)
                loads |= {"new_timestep_s": steps.new_timestep(), "return_s": steps.back()}
                row |= {key: largest(value) for key, value in loads.items()} | {"on_device": steps.resident}
            except OutOfMemory as error:  # raised on all ranks
                row = {"error": str(error)}
            steps.task.release()
            result["variants"]["task" if limit is None else f"task, {limit:g} GiB"] = row
            if rank == 0:
                print(result["size"], limit, row, flush=True)
                write(report, folder)


def measure_forward(
    device: torch.device, forward: Forward, repeat: int, references: dict[str, Tensor], size: str, of_core: bool
) -> dict:
    """Measure time and memory of a forward, and its relative difference to the first variant of this size."""
    predictions: list[Tensor] = []
    try:
        row = measure(device, lambda: predictions.append(forward()), repeat)
    except torch.OutOfMemoryError as error:
        return {"error": str(error).split(". ")[0]}
    row = {key: largest(value) for key, value in row.items()}
    if not of_core:
        prediction = whole(predictions[-1], size)
        reference = references.setdefault(size, prediction)
        row["difference"] = round(((prediction - reference).norm() / reference.norm()).item(), 5)
    return row


def whole(rows: Tensor, size: str) -> Tensor:
    """Gather the rows of the prediction from all ranks. Both branches have the same inputs here. A collective."""
    if not dist.is_initialized():
        return rows.float()
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows.float())
    return torch.cat(parts)[: math.prod(SIZES[size])]


def write(report: dict, folder: Path) -> None:
    """Write the report as JSON and as a Markdown table."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = any(name.startswith("task") for result in report["results"] for name in result["variants"])
    name = f"denoise-{'memory-' if tasks else ''}{report['machine'].replace(' ', '-').lower()}-x{report['ranks']}"
    name = "".join(c for c in name if c.isalnum() or c in "-_")
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    columns = COLUMNS | (TASK_COLUMNS if tasks else {})
    lines = [
        f"### {report['machine']}, {report['ranks']} rank(s), {report['dtype']}, {report['date']}",
        "",
        f"{report['versions']}; sustained matrix product {report['matmul_sustained_tflops']} TFLOP/s. "
        f"`{report['command']}`",
        "",
        "| size | variant | seconds | over floor | " + " | ".join(columns.values()) + " |",
        "| --- | --- | --- | --- |" + " --- |" * len(columns),
    ]
    for result in report["results"]:
        floor = result["variants"]["floor"]["best_s"]
        for key, row in result["variants"].items():
            if "error" in row:
                lines.append(f"| {result['size']} | {key} | {row['error']} |" + " |" * (1 + len(columns)))
                continue
            forwards = 2 if "step" in key else 1
            ratio = f"{row['best_s'] / floor / forwards:.2f}" if floor else ""
            cells = [row["best_s"], ratio, *(row.get(name, "") for name in columns)]
            lines.append(f"| {result['size']} | {key} | " + " | ".join(map(str, cells)) + " |")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
