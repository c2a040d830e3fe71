"""Ascend devices: steps with a stand-in for torch_npu, and the attention kernel's name and arguments in the wheel."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import torch

from distributed.denoise import attention
from distributed.denoise.placement import Placement
from distributed.denoise.task import DenoiseTask
from distributed.denoise.weights import open_transformer
from tests.ranks.test_npu import ROOT, STAND_INS, wheel  # noqa: F401  a fixture
from tests.unit.denoise_models import make_model
from tests.unit.test_denoise_task import make_job

LAYERS = 6
STEPS = """
import sys, torch
from distributed import RankGroup
if __name__ == "__main__":
    path, inputs, *limits = sys.argv[1:]
    latents, conditions = torch.load(inputs)
    velocities = {}
    for devices in ("cpu,cpu", "npu:0-1"):
        with RankGroup(devices, dtype="float32") as group:
            denoiser = group.denoiser(path)
            steps = [denoiser(latents, 731.0, [conditions], memory=memory) for memory in (None, *map(int, limits))]
            group.release()
            velocities[devices] = [*steps, denoiser(latents, 731.0, [conditions])]
    for velocity in [*velocities["cpu,cpu"], *velocities["npu:0-1"]]:
        assert torch.equal(velocity, velocities["cpu,cpu"][0])
    print("the same velocities")
"""


def test_steps_on_npu_devices_give_the_same_bits_as_on_cpus_with_any_placement_of_the_weights(tmp_path):
    """Only the copies and streams of an accelerator are shown to be used in a possible order: see the stand-in."""
    model = make_model(use_meanflow=True, num_layers=LAYERS).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "transformer")
    checkpoint = open_transformer(tmp_path / "transformer")
    job, _ = make_job(model.float(), checkpoint)
    task = DenoiseTask(torch.device("cpu"))
    task.world_size = 2
    task._open(job.fields | {"dtype": "float32"})
    placements = [Placement(False, resident, LAYERS) for resident in (LAYERS, 2, 0)]
    limits = [task._sizes(job.request).needed(placement) for placement in placements]
    inputs = job.latents, {"encoder_hidden_states": torch.randn(1, 5, model.config.text_embed_dim)}
    torch.save(inputs, tmp_path / "inputs")
    (tmp_path / "joined").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(tmp_path / "transformer"), str(tmp_path / "inputs"), *map(str, limits)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(STAND_INS), str(ROOT)]),
            "HV15_TEST_NPUS": "2",
            "HV15_TEST_HCCL": str(tmp_path / "joined"),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout == "the same velocities\n", done.stderr[-3000:]
    assert {file.name for file in (tmp_path / "joined").iterdir()} == {"0 of 2", "1 of 2"}


def call_of(name: str) -> ast.Call:
    """The one call of a function of this name in `attention`."""
    nodes = ast.walk(ast.parse(Path(attention.__file__).read_text()))
    (call,) = (node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == name)
    return call


def test_the_attention_kernel_takes_these_arguments_and_returns_the_result_first(wheel):  # noqa: F811
    source = wheel.read("torch_npu/op_plugin/meta/_meta_registrations.py").decode()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    registered = '@impl(m, "npu_fusion_attention")'
    (function,) = (
        node for node in functions if any(ast.unparse(d) in registered.replace('"', "'") for d in node.decorator_list)
    )
    call = call_of("npu_fusion_attention")
    names = [argument.arg for argument in function.args.args + function.args.kwonlyargs]
    assert names[: len(call.args)] == ["query", "key", "value"]
    assert {keyword.arg for keyword in call.keywords} == {"head_num", "input_layout", "scale"} <= set(names)
    layout = next(ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "input_layout")
    assert f'input_layout == "{layout}"' in ast.get_source_segment(source, function)
    assert "npu_fusion_attention" in wheel.read("torch_npu/_op_plugin_docs.py").decode()
    returned = next(node for node in ast.walk(function) if isinstance(node, ast.Return))
    assert "attention_score" in ast.unparse(returned.value.elts[0])
