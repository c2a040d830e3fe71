"""`make bench` as it runs without a GPU: small, and only to show that it works."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_measures_every_variant_and_writes_them_down(tmp_path):
    command = [sys.executable, "-m", "benchmarks.decode", "--repeat", "1", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout=240)
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    (result,) = report["results"]
    expected = {"floor", "floor, sustained", "ours seamless", "ours tiled", "ComfyUI core", "diffusers tiled"}
    assert set(result["variants"]) == expected
    for name in expected - {"floor", "floor, sustained"}:
        assert 0 < result["variants"][name]["best_s"] <= 240 and "first_s" in result["variants"][name]
    assert all(result["variants"][f"ours {mode}"]["tail_ms"] >= 0 for mode in ("seamless", "tiled"))
    (table,) = tmp_path.glob("*.md")
    assert all(f"| {name} |" in table.read_text() for name in expected)
