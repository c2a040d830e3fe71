"""The package without ComfyUI: the example in the README, and the modules that an import loads."""

import os
import re
import subprocess
import sys
from pathlib import Path

from miniature.folder import ensure_folder

ROOT = Path(__file__).resolve().parents[2]
COMPUTE = (
    "distributed.ops",
    "distributed.vae.engine",
    "distributed.vae.hunyuanvideo15",
    "distributed.vae.task",
    "distributed.denoise.transformer",
    "distributed.denoise.block",
    "distributed.denoise.task",
    "diffusers",
)


def test_the_readmes_python_example_runs(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    vae = ensure_folder("t2v", tmp_path) / "vae"
    code = block.replace('"path/to/vae"', repr(str(vae)))
    assert code != block
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 9, 96, 128, 3])" in done.stdout


def test_importing_the_package_loads_neither_comfyui_nor_diffusers():
    code = "import sys, distributed; bad = {'comfy', 'nodes', 'diffusers', 'torch_npu'} & set(sys.modules); print(bad)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_importing_the_package_starts_no_thread_and_loads_no_compute_code():
    code = (
        "import sys, threading; sys.path.insert(0, sys.argv[1]); import distributed\n"
        f"heavy = [name for name in sys.modules if name.startswith(({COMPUTE!r})) and 'layout' not in name]\n"
        "print([name for name in heavy if name != 'distributed.vae.hunyuanvideo15'], 'triton' in sys.modules)\n"
        "print(threading.active_count())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n1\n", done.stdout
