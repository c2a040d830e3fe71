"""The benchmarks run without a GPU, at small sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end, quality
from set_up import comfyui_path

ROOT = Path(__file__).resolve().parents[2]
TEXT_ENCODERS = """
import json, sys
sys.path.insert(0, sys.argv[1]); sys.argv[1:] = []
import comfy.cli_args
comfy.cli_args.args.cpu = True
import comfy.sd, torch
from comfy.text_encoders.hunyuan_image import te

with torch.device("meta"):
    files = [{key: torch.empty(shape) for key, shape in shapes.items()} for shapes in json.load(sys.stdin)]
    model = te(**comfy.sd.llama_detect(files))(device="meta", dtype=torch.float32)
kinds = [comfy.sd.detect_te_model(file).name for file in files]
print(json.dumps([kinds, [[*found] for file in files for found in model.load_sd(file)]]))
"""
"""Detects files of text encoders, and loads them into core's model, without storing a value."""


def run(module: str, *options: object) -> None:
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, options)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout=240)


def test_the_decode_benchmark_measures_every_variant_and_writes_a_report(tmp_path):
    run("decode", "--repeat", 1, "--out", tmp_path)
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    (result,) = report["results"]
    expected = {"floor", "floor, sustained", "ours seamless", "ours tiled", "ComfyUI core", "diffusers tiled"}
    assert set(result["variants"]) == expected
    for name in expected - {"floor", "floor, sustained"}:
        assert 0 < result["variants"][name]["best_s"] <= 240 and "first_s" in result["variants"][name]
    assert all(result["variants"][f"ours {mode}"]["tail_ms"] >= 0 for mode in ("seamless", "tiled"))
    (table,) = tmp_path.glob("*.md")
    assert all(f"| {name} |" in table.read_text() for name in expected)


def test_a_prediction_gives_time_memory_and_traffic_for_each_number_of_ranks(tmp_path):
    run("predict", "--ranks", "1,2", "--out", tmp_path)
    one, two = json.loads((tmp_path / "predicted-scaling.json").read_text())["predictions"]
    assert one["border_mb"] == one["gathered_mb"] == 0 and two["border_mb"] > 0
    assert all(row["compute_s"] > 0 and row["planned_gib"] > 0 for row in (one, two))


def test_the_quality_benchmark_finds_no_difference_in_seamless_mode_and_some_between_tiles(tmp_path, monkeypatch):
    arguments = ["--size", "32x288x1", "--ranks", "2", "--dtypes", "float32", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["quality", *map(str, arguments)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    quality.main()
    rows = {row["decode"]: row for row in json.loads((tmp_path / "quality-cpu.json").read_text())["rows"]}
    assert rows["seamless"]["levels"] < 0.01 and rows["seamless"]["ssim_untiled"] == 1
    for tiled in ("tiled 256, overlap 64", "tiled 128, overlap 32", "tiled 128, overlap 0"):
        assert rows[tiled]["levels"] > 0.1 and rows[tiled]["psnr_untiled"] < rows["seamless"]["psnr_untiled"]
    assert rows["diffusers untiled"]["psnr_original"] == rows["seamless"]["psnr_original"] > 15
    assert "| cpu,cpu | seamless | float32 |" in (tmp_path / "quality-cpu.md").read_text()


def test_the_end_to_end_benchmark_times_each_stage_of_a_prompt(tmp_path):
    run("end_to_end", "--steps", 3, "--out", tmp_path)
    report = json.loads((tmp_path / "end-to-end-cpu.json").read_text())
    assert [(row["devices"], row["prompt"], row["steps"]) for row in report["rows"]] == [
        ("cpu", "first", 2),
        ("cpu", "second", 3),
        ("cpu,cpu", "first", 2),
        ("cpu,cpu", "second", 3),
    ]
    for row in report["rows"]:
        assert row["text encoding"] > 0 and row["denoising"] > 0 and row["decoding"] > 0
        assert row["total"] == pytest.approx(sum(row[stage] for stage in end_to_end.STAGES), abs=0.03)
    assert all(f"{name} " in report["versions"] for name in ("torch", "diffusers", "transformers", "ComfyUI"))
    assert "| cpu,cpu | second |" in (tmp_path / "end-to-end-cpu.md").read_text()


@pytest.mark.parametrize("nodes", [end_to_end.OURS, end_to_end.CORE, end_to_end.DISTRIBUTED])
def test_the_end_to_end_benchmark_counts_every_node_of_a_graph_once(nodes):
    stages = [*end_to_end.STAGES.values(), end_to_end.SAVING]
    prompt = end_to_end.graph(nodes, "cpu,cpu", "480x848x33", 50, 1)
    assert all(sum(name in names for names in stages) == 1 for name in prompt)
    assert any(node["class_type"].startswith("HV15") for node in prompt.values()) is (nodes != end_to_end.CORE)


@pytest.mark.parametrize("nodes", [end_to_end.CORE, end_to_end.DISTRIBUTED])
def test_core_accepts_the_graphs_of_the_end_to_end_benchmark(host, nodes):
    folders = {"unet_name": "diffusion_models", "vae_name": "vae"}
    files = [
        host.base / "models" / folders.get(kind, "text_encoders") / name for kind, name in end_to_end.FILES.items()
    ]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    try:
        # Raises PromptRefused if a node, an input or a file is unknown. Empty files cannot be loaded.
        run = host.run(end_to_end.graph(nodes, "cpu", "64x96x9", 2, 1))
    finally:
        for file in files:
            file.unlink()
    assert run.error["node_type"] in ("UNETLoader", "DualCLIPLoader", "VAELoader")


def test_core_reads_the_text_encoders_of_the_end_to_end_benchmark():
    shapes = json.dumps([shapes for _, shapes in end_to_end.text_encoders().values()])
    command = [sys.executable, "-c", TEXT_ENCODERS, str(comfyui_path())]
    done = subprocess.run(command, input=shapes, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds, differing = json.loads(done.stdout.splitlines()[-1])
    assert kinds == ["QWEN25_7B", "BYT5_SMALL_GLYPH"]
    assert not any(differing), "missing or unexpected keys"
