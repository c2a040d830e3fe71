"""Measure whole prompts in a headless ComfyUI: the time of each stage with one rank and with two.

    python -m benchmarks.end_to_end

With two GPUs the model is full size with random weights, written to a temporary folder in diffusers' format. Otherwise
it is the tiny built-in model, and the run is only a functional test. Each number of ranks runs two prompts; the ranks
start during the first. Writes JSON and a Markdown table.
"""

import argparse
import datetime
import json
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.decode import ROOT, machine, target

sys.path.append(str(ROOT / "scripts"))
from demo import ProgressBar, rank_count, two_choices

from comfyui_host import Host, Run

STAGES = {"loading": "pipeline", "text encoding": "text", "denoising": "sampler", "decoding": "decode"}
NAME = "HunyuanVideo-1.5-480p_t2v-random"


def save_full_size(folder: Path, device: torch.device) -> None:
    """Write a text-to-video pipeline of the real widths (Tencent's 480p checkpoint) with random weights, bfloat16.

    The tokenizers are those of the tiny model, which need no download.
    """
    from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

    pipeline = runpy.run_path(str(ROOT / "nodes" / "tiny.py"))["build"]("t2v")
    language = Qwen2_5_VLTextConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
    )
    glyphs = T5Config(
        vocab_size=1510,
        d_model=1472,
        d_kv=64,
        d_ff=3584,
        num_layers=12,
        num_heads=6,
        feed_forward_proj="gated-gelu",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            pipeline.register_modules(
                transformer=HunyuanVideo15Transformer3DModel(task_type="t2v"),
                vae=AutoencoderKLHunyuanVideo15(),
                text_encoder=Qwen2_5_VLTextModel(language),
                text_encoder_2=T5EncoderModel(glyphs),
            )
    finally:
        torch.set_default_dtype(before)
    pipeline.save_pretrained(folder)


def measure(host: Host, graph: dict) -> Iterator[dict]:
    """Yield a row with the seconds of each stage for every prompt."""
    for devices in two_choices():
        graph["ranks"]["inputs"]["devices"] = devices
        for attempt in ("first", "second"):
            graph["sampler"]["inputs"]["seed"] += 1
            graph["text"]["inputs"]["positive"] += " Again."  # only the model's node may be cached
            bar = ProgressBar(f"{rank_count(devices)}, {attempt}")
            run = host.run(graph, bar.follow)
            bar.end()
            if run.error:
                raise SystemExit(f"{run.error['node_type']} failed: {run.error['exception_message']}")
            yield {"devices": devices, "prompt": attempt} | seconds(run)


def seconds(run: Run) -> dict[str, float]:
    """Return the seconds of each stage of a prompt."""
    times = {stage: round(run.seconds.get(node, 0), 2) for stage, node in STAGES.items()}
    return times | {"total": round(sum(run.seconds.values()), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    device, _, _ = target(0)
    full = torch.cuda.device_count() > 1
    graph = json.loads((ROOT / "api_prompts" / "text_to_video.json").read_text())
    graph["sampler"]["inputs"] |= {"steps": options.steps}
    if full:
        graph["pipeline"]["inputs"]["model"] = NAME
        graph["sampler"]["inputs"] |= {"width": 848, "height": 480, "frames": 33}
    report = {
        "machine": machine(device),
        "date": datetime.date.today().isoformat(),
        "model": "full size, random weights" if full else "tiny",
        "command": f"python -m benchmarks.end_to_end --steps {options.steps}",
        **{name: graph["sampler"]["inputs"][name] for name in ("width", "height", "frames", "steps")},
        "prompts": [],
    }
    with tempfile.TemporaryDirectory(prefix="hv15-end-to-end-") as folder:
        if full:
            save_full_size(Path(folder) / "models" / "diffusers" / NAME, device)
            torch.cuda.empty_cache()
        host = Host(Path(folder))
        try:
            for row in measure(host.wait(), graph):
                print(row, flush=True)
                report["prompts"].append(row)
                write(report, options.out)  # an interrupted run keeps its rows
        finally:
            host.close()


def write(report: dict, folder: Path) -> None:
    """Write the report as JSON and as a Markdown table."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"end-to-end-{'gpu' if report['model'] != 'tiny' else 'cpu'}"
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    columns = [*STAGES, "total"]
    lines = [
        f"### {report['machine']}, {report['width']}x{report['height']}, {report['frames']} frames, {report['steps']} "
        f"steps, model {report['model']}, {report['date']}",
        "",
        f"`{report['command']}`; seconds.",
        "",
        "| devices | prompt | " + " | ".join(columns) + " |",
        "| --- | --- |" + " --- |" * len(columns),
        *(
            f"| {row['devices']} | {row['prompt']} | " + " | ".join(str(row[name]) for name in columns) + " |"
            for row in report["prompts"]
        ),
    ]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
