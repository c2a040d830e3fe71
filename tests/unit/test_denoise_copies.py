"""A rank's task whose weights are copied to its device, as on an accelerator, in the host's memory."""

import gc
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distributed.denoise import upload
from distributed.denoise.layout import Architecture
from distributed.denoise.loading import OnHost
from distributed.denoise.merge import Patch
from distributed.denoise.patches import Patches
from distributed.denoise.placement import Placement
from distributed.denoise.task import DenoiseTask
from distributed.denoise.weights import core_shapes, open_transformer
from distributed.errors import Cancelled, OutOfMemory
from distributed.ranks.task import JobWatch
from tests.unit.core_inputs import core_inputs, job_of, random_weights
from tests.unit.denoise_models import run

SMALL = Architecture(heads=2, layers=3)
BESIDE = torch.device("cpu:0")
"""A device to which weights are copied, because tensors on the CPU are on `torch.device("cpu")`."""


def save(folder: Path, weights: dict[str, Tensor]):
    save_file(weights, folder / "model.safetensors")
    return open_transformer(folder / "model.safetensors")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("transformer"), random_weights(SMALL))


def lora(strength: float) -> dict[str, list[Patch]]:
    """Patches of all matrices, and of a norm that travels with the biases."""
    generator = torch.Generator().manual_seed(5)
    found = {"vision_in.proj.4.weight": [Patch("diff", strength, tensors={"diff": torch.ones(SMALL.width)})]}
    for key, shape in core_shapes(SMALL).items():
        if len(shape) == 2 and key.endswith("weight"):
            up, down = (torch.randn(size, generator=generator) / 8 for size in ((shape[0], 4), (4, shape[1])))
            found[key] = [Patch("lora", strength, tensors={"up": up, "down": down.bfloat16()})]
    return found


def patched(checkpoint, strength: float | None):
    patches = None if strength is None else Patches.make(checkpoint, lora(strength))
    return job_of(checkpoint, core_inputs(), patches=patches)


def weights_of(task: DenoiseTask) -> dict[str, Tensor]:
    model = task.transformer.model
    found = {name: value for name, value in model.state_dict().items() if not value.is_meta}
    for name, layer in model.named_modules():
        if isinstance(layer, OnHost):
            found |= {f"{name}.weight": layer.weight.tensor, f"{name}.bias": layer.bias.tensor}
    for i, block in task.transformer.blocks.weights.items():
        found |= {f"transformer_blocks.{i}.{name}": stored.tensor for name, stored in block.items()}
    return found


@pytest.mark.parametrize("placement", [Placement(True, 3, 3), Placement(False, 3, 3), Placement(False, 0, 3)])
@pytest.mark.parametrize("batch", [0, 2**40])
def test_copied_weights_have_the_bits_of_mapped_ones(checkpoint, monkeypatch, placement, batch):
    monkeypatch.setattr(upload, "BATCH", batch)
    copying, mapping = DenoiseTask(BESIDE), DenoiseTask(torch.device("cpu"))
    for strength in (None, 0.5, 0.7, None):
        job = patched(checkpoint, strength)
        copying._open(job.fields | {"dtype": "float32"})
        job = job.limited(copying._sizes(job.request).needed(placement))
        results = [run(task, job) for task in (copying, mapping)]
        assert torch.equal(*results) and copying.placement == placement
        found, expected = map(weights_of, (copying, mapping))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        if strength == 0.7:
            copying.release()


def test_scaled_8_bit_weights_are_copied_with_the_values_of_mapped_ones(tmp_path):
    weights = random_weights(SMALL)
    for key in [key for key, value in weights.items() if value.ndim == 2 and key.endswith("weight")]:
        scale = weights[key].abs().max() / 448
        weights |= {key: (weights[key] / scale).to(torch.float8_e4m3fn), f"{key}_scale": scale}
    checkpoint = save(tmp_path, weights)
    for strength in (None, 0.5):
        job = patched(checkpoint, strength)
        assert torch.equal(*(run(DenoiseTask(device), job) for device in (BESIDE, torch.device("cpu"))))


class Late(JobWatch):
    """Cancels at the n-th check."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def cancelled(self) -> bool:
        return super().cancelled() or self.moved == self.n


@pytest.mark.parametrize(("before", "after"), [(None, 0.7), (0.5, 0.7), (0.5, None)])
@pytest.mark.parametrize("n", [1, 30, 60, 90])
def test_a_cancel_of_a_change_leaves_weights_that_the_next_step_corrects(checkpoint, before, after, n):
    task, job = DenoiseTask(BESIDE), patched(checkpoint, after)
    expected = run(DenoiseTask(BESIDE), job)
    run(task, patched(checkpoint, before))
    for load in job.loads:
        task.load(load.fields | {"dtype": "float32"}, load.inputs, JobWatch())
    with pytest.raises(Cancelled):
        task.load(job.fields | {"dtype": "float32"}, {}, Late(n))
    assert torch.equal(run(task, job), expected)


@pytest.mark.parametrize("copies", [1, 20, 60])
@pytest.mark.parametrize("loaded", [False, True])
def test_memory_that_runs_out_in_a_copy_is_told_and_the_next_step_loads(checkpoint, monkeypatch, loaded, copies):
    task, job = DenoiseTask(BESIDE), patched(checkpoint, 0.5)
    if loaded:
        run(task, patched(checkpoint, None))
    sent, send = [], upload.Uploads._send

    def fail(uploads, *pair):
        sent.append(pair)
        if len(sent) == copies:
            raise torch.OutOfMemoryError("no room")
        send(uploads, *pair)

    with monkeypatch.context() as context, pytest.raises(OutOfMemory):
        context.setattr(upload.Uploads, "_send", fail)
        run(task, job)
    assert torch.equal(run(task, job), run(DenoiseTask(BESIDE), job))


def test_signs_of_life_come_while_weights_are_copied(checkpoint, monkeypatch):
    """A disk may need minutes for all of them."""
    watch, moved, send = JobWatch(), [], upload.Uploads._send

    def record_and_send(uploads, *pair):
        moved.append(watch.moved)
        send(uploads, *pair)

    monkeypatch.setattr(upload.Uploads, "_send", record_and_send)
    run(DenoiseTask(BESIDE), patched(checkpoint, None), watch)
    assert len(moved) > 50 and all(a < b for a, b in itertools.pairwise(moved))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no list of mappings")
def test_after_a_release_the_checkpoint_is_not_mapped(checkpoint):
    task = DenoiseTask(BESIDE)
    run(task, patched(checkpoint, None))
    run(task, patched(checkpoint, 0.5))
    task.release()
    gc.collect()
    assert str(checkpoint.path) not in Path("/proc/self/maps").read_text()
