"""ComfyUI with diffusers missing, too old or broken: nodes that do not need it work, the others report it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from core_models import weights_of

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import importlib, importlib.util, sys
root, comfyui, vae = sys.argv[1:]
sys.argv[1:] = []
sys.path.append(comfyui)
import comfy.cli_args
comfy.cli_args.args.cpu = True
spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
nodes = importlib.import_module("pack.nodes")
print("nodes:", sorted(node.define_schema().node_id for node in nodes.NODES))
groups, vaes, decoding = (importlib.import_module(f"pack.nodes.{name}") for name in ("groups", "vae", "decoding"))
import torch
model = vaes.load_vae(vae)
description = nodes.RankGroupNode.execute(devices="cpu", backend="auto", dtype="auto", keep_loaded="keep",
                                          start_timeout=120, stall_timeout=60).result[0]
samples = {"samples": torch.zeros(1, 32, 1, 2, 2)}
frames = nodes.DistributedVAEDecode.execute(samples, model, description, mode="seamless", tile_size=256, overlap=64)
print("frames:", tuple(frames.result[0].shape))
try:
    nodes.LoadPipeline.execute("tiny (built in)", "auto", "none")
except Exception as error:
    print("refusal:", type(error).__name__, error)
try:
    importlib.import_module("pack.nodes.libraries").check_transformer()
except Exception as error:
    print("ranks:", type(error).__name__, error)
groups.stop_all()
"""

FAULTS = {
    "missing": "raise ModuleNotFoundError(\"No module named 'diffusers'\")",
    "old": "__version__ = '0.30.0'",
    "broken": "raise RuntimeError('Failed to import diffusers because of: cannot import name X')",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_the_libraries_all_nodes_but_the_pipeline_nodes_work(core, tmp_path, fault):
    from set_up import comfyui_path

    save_file(weights_of(core.model), core.path)
    (tmp_path / "packages" / "diffusers").mkdir(parents=True)
    (tmp_path / "packages" / "diffusers" / "__init__.py").write_text(FAULTS[fault])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "packages")}
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(comfyui_path()), str(core.path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert lines["nodes"].count("HV15") == 8 and lines["frames"] == "(1, 32, 32, 3)"
    for line in ("refusal", "ranks"):  # of Load HunyuanVideo-1.5, and of Distribute Model
        assert "RuntimeError This node needs diffusers and transformers" in lines[line]
        assert "Installed: diffusers" in lines[line]
