"""The benchmarks run without a GPU, at small sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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


def test_the_end_to_end_benchmark_times_each_stage_of_a_prompt(tmp_path):
    run("end_to_end", "--steps", 1, "--out", tmp_path)
    rows = json.loads((tmp_path / "end-to-end-cpu.json").read_text())["prompts"]
    assert [(row["devices"], row["prompt"]) for row in rows] == [
        ("cpu", "first"),
        ("cpu", "second"),
        ("cpu,cpu", "first"),
        ("cpu,cpu", "second"),
    ]
    assert all(row["denoising"] > 0 and row["decoding"] > 0 for row in rows)
    assert "| cpu,cpu | second |" in (tmp_path / "end-to-end-cpu.md").read_text()
