"""Patches of weights: merged with core's arithmetic, to the bit, and replaced without a reload."""

import pytest
import torch
from core_transformer import run_core
from safetensors.torch import save_file
from torch import Tensor

from distributed.denoise.job import DenoiseJob
from distributed.denoise.layout import Architecture
from distributed.denoise.merge import Patch, merge
from distributed.denoise.patches import Patches, read_patches
from distributed.denoise.placement import Placement, Sizes
from distributed.denoise.task import KEPT_PATCHES, DenoiseTask
from distributed.denoise.weights import open_transformer
from distributed.errors import Cancelled, NotLoaded
from distributed.ranks.task import JobWatch
from tests.unit.core_inputs import core_inputs, job_of, random_weights
from tests.unit.denoise_models import error, make_model, run

SIZES = {"heads": 2, "layers": 2}
BLOCK = "double_blocks.1"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lora(rows: int, columns: int, strength: float = 0.8, *, rank: int = 4, seed: int = 0, **options) -> Patch:
    tensors = {"up": draw(rows, rank, seed=seed), "down": draw(rank, columns, seed=seed) / columns}
    return Patch("lora", strength, tensors=tensors, **options)


LINEAR, CONVOLUTION = draw(12, 10), draw(8, 6, 3, 3)
HALVES = {"w1_a": draw(12, 3), "w1_b": draw(3, 10), "w2_a": draw(12, 3, seed=1), "w2_b": draw(3, 10, seed=1)}
SMALL = {"up": draw(12, 4), "down": draw(4, 10)}
TUCKER = {"w1_a": draw(3, 8), "w1_b": draw(3, 6), "w2_a": draw(3, 8, seed=1), "w2_b": draw(3, 6, seed=1)}
MERGES = {
    "lora": (LINEAR, [Patch("lora", 0.7, tensors=SMALL)]),
    "lora with alpha": (LINEAR, [Patch("lora", 0.7, 0.9, SMALL, alpha=3.0)]),
    "lora in float16": (LINEAR, [Patch("lora", 0.7, tensors={k: t.half() for k, t in SMALL.items()}, alpha=2.0)]),
    "lora of a convolution": (
        CONVOLUTION,
        [Patch("lora", 0.7, tensors={"up": draw(8, 4, 1, 1), "down": draw(4, 6, 1, 1), "mid": draw(4, 4, 3, 3)})],
    ),
    "dora": (LINEAR, [Patch("lora", 1.0, tensors=SMALL | {"dora_scale": draw(12, 1)}, alpha=2.0)]),
    "dora of less than 1": (LINEAR, [Patch("lora", 0.7, tensors=SMALL | {"dora_scale": draw(12, 1)}, alpha=2.0)]),
    "dora of columns": (LINEAR, [Patch("lora", 0.7, tensors=SMALL | {"dora_scale": draw(1, 10)})]),
    "loha": (LINEAR, [Patch("loha", 0.7, tensors=HALVES, alpha=2.0)]),
    "loha of a convolution": (
        CONVOLUTION,
        [Patch("loha", 0.7, tensors=TUCKER | {"t1": draw(3, 3, 3, 3), "t2": draw(3, 3, 3, 3, seed=1)}, alpha=2.0)],
    ),
    "lokr": (LINEAR, [Patch("lokr", 0.7, tensors={"w1": draw(3, 2), "w2": draw(4, 5)}, alpha=2.0)]),
    "lokr in parts": (
        LINEAR,
        [
            Patch(
                "lokr",
                0.7,
                tensors={"w1_a": draw(3, 2), "w1_b": draw(2, 2), "w2_a": draw(4, 3), "w2_b": draw(3, 5)},
                alpha=2.0,
            )
        ],
    ),
    "lokr of a convolution": (
        CONVOLUTION,
        [
            Patch(
                "lokr",
                0.7,
                tensors={"w1": draw(2, 3), "w2": draw(4, 2, 3, 3)},
                alpha=2.0,
            )
        ],
    ),
    "diff": (LINEAR, [Patch("diff", 0.7, 0.5, {"diff": draw(12, 10)})]),
    "diff of strength 0": (LINEAR, [Patch("diff", 0.0, 0.5, {"diff": draw(12, 10)})]),
    "set": (LINEAR, [Patch("set", tensors={"value": draw(12, 10, seed=1).half()})]),
    "several": (
        LINEAR,
        [
            Patch("lora", 0.7, 0.9, SMALL),
            Patch("diff", -0.3, tensors={"diff": draw(12, 10)}),
            Patch("loha", 0.2, tensors=HALVES),
        ],
    ),
}
MERGES |= {f"{name} into float16": (weight.half(), patches) for name, (weight, patches) in MERGES.items()}

TOUCHED = {
    f"{BLOCK}.img_attn.qkv.weight": [lora(768, 256), lora(768, 256, 0.3, seed=1)],
    f"{BLOCK}.txt_attn.proj.weight": [lora(256, 256, alpha=2.0)],
    f"{BLOCK}.img_attn.norm.query_norm.weight": [Patch("diff", 0.5, tensors={"diff": draw(128)})],
    "final_layer.adaLN_modulation.1.weight": [lora(512, 256)],
    "final_layer.adaLN_modulation.1.bias": [Patch("diff", 0.5, tensors={"diff": draw(512)})],
    "txt_in.input_embedder.weight": [lora(256, 3584)],
    "img_in.proj.weight": [Patch("diff", 0.1, tensors={"diff": draw(256, 65, 1, 1, 1)})],
}
"""Patches of weights that ranks have in parts, with swapped halves, or that results are kept of."""
INPUTS = core_inputs(glyphs=3)
FORWARD = {"model": {"width": 256, "layers": 2}, "weights": "plain", "inputs": INPUTS}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(Architecture(**SIZES))


@pytest.fixture(scope="module")
def of_core(weights, tmp_path_factory) -> dict[str, Tensor]:
    forwards = {"original": FORWARD, "patched": FORWARD | {"patches": TOUCHED}}
    return run_core(tmp_path_factory.mktemp("core"), {"plain": weights}, forwards, MERGES)


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file(weights, path)
    return open_transformer(path)


@pytest.fixture
def task():
    return DenoiseTask(torch.device("cpu"))


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_gives_the_bits_of_core(name, of_core):
    weight, patches = MERGES[name]
    for patch in patches:
        patch.check(tuple(weight.shape))
    merged = merge(weight.clone(), patches)
    assert merged.dtype == weight.dtype and torch.equal(merged, of_core[name])
    assert torch.equal(merged, weight) == (name.startswith("diff of strength 0") and patches[0].strength_model == 1.0)


def patched_job(checkpoint, patches: Patches | None, **options) -> DenoiseJob:
    return job_of(checkpoint, INPUTS, patches=patches, **options)


def places(task: DenoiseTask) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in task.transformer.model.named_parameters()}


def test_a_patched_forward_equals_cores_and_removed_patches_leave_no_trace(checkpoint, task, of_core):
    patches = Patches.make(checkpoint, TOUCHED)
    original = run(task, patched_job(checkpoint, None))
    before, bits = places(task), {name: part.clone() for name, part in task.transformer.model.state_dict().items()}
    patched = run(task, patched_job(checkpoint, patches))
    moved = {name for name, place in places(task).items() if place != before[name]}
    assert moved == {
        *(f"transformer_blocks.1.attn.{part}.weight" for part in ("to_q", "to_k", "to_v", "to_add_out", "norm_q")),
        *(f"norm_out.linear.{part}" for part in ("weight", "bias")),
        *(f"{part}.weight" for part in ("context_embedder.proj_in", "x_embedder.proj")),
    }
    assert error(original, of_core["original"]) < 1e-5 and error(patched, of_core["patched"]) < 1e-5
    assert error(patched, original) > 1e-2
    assert torch.equal(run(task, patched_job(checkpoint, None)), original)
    assert all(torch.equal(part, bits[name]) for name, part in task.transformer.model.state_dict().items())


def test_a_changed_strength_equals_a_fresh_load_with_it(checkpoint, task):
    key = f"{BLOCK}.img_attn.qkv.weight"
    sets = [Patches.make(checkpoint, {key: [lora(768, 256, strength)]}) for strength in (0.5, 1.0)]
    for patches in (*sets, sets[0]):
        job = patched_job(checkpoint, patches)
        assert torch.equal(run(task, job), run(DenoiseTask(torch.device("cpu")), job))
    assert sets[0].key != sets[1].key
    assert Patches.make(checkpoint, {f"diffusion_model.{key}": [lora(768, 256, 0.5)]}).key == sets[0].key
    assert Patches.make(checkpoint, {key: [lora(768, 256, 0.5)]}, torch.float16).key != sets[0].key


def test_another_strength_of_the_same_tensors_copies_nothing(checkpoint, task):
    one, key = lora(768, 256, 0.5), f"{BLOCK}.img_attn.qkv.weight"
    first = Patches.make(checkpoint, {key: [one]})
    stronger = Patch("lora", 1.0, tensors=one.tensors)
    second = Patches.make(checkpoint, {key: [stronger]}, before=first)
    assert second.file is first.file and second.key == Patches.make(checkpoint, {key: [stronger]}).key != first.key
    results = [run(task, patched_job(checkpoint, patches)) for patches in (first, second)]
    assert torch.equal(results[1], run(task, patched_job(checkpoint, Patches.make(checkpoint, {key: [stronger]}))))
    assert not torch.equal(*results)
    one.tensors["up"].mul_(2)
    changed = Patches.make(checkpoint, {key: [stronger]}, before=second)
    assert changed.file is not second.file and changed.key not in (first.key, second.key)
    with torch.inference_mode():  # as in ComfyUI
        other = lora(768, 256, 1.0)
        third = Patches.make(checkpoint, {key: [other]}, before=changed)
        assert third.file is not changed.file and third.key == second.key
        assert Patches.make(checkpoint, {key: [other]}, before=third).file is third.file


def test_patches_that_were_not_sent_or_are_long_ago_are_asked_for(checkpoint, task):
    key = f"{BLOCK}.img_mlp.0.bias"
    sets = [
        Patches.make(checkpoint, {key: [Patch("diff", strength, tensors={"diff": draw(1024)})]})
        for strength in range(KEPT_PATCHES + 1)
    ]
    jobs = [patched_job(checkpoint, patches) for patches in sets]
    for job in jobs:
        run(task, job)
    with pytest.raises(NotLoaded, match="patches"):
        task.load(jobs[0].fields | {"dtype": "float32"}, {}, JobWatch())
    task.load(jobs[1].fields | {"dtype": "float32"}, {}, JobWatch())


@pytest.mark.parametrize("placement", [Placement(False, 2, 2), Placement(False, 0, 2)])
def test_patches_reach_weights_that_stay_on_the_host(placement, checkpoint, task, monkeypatch):
    patches = Patches.make(checkpoint, TOUCHED | {f"{BLOCK}.img_mod.lin.weight": [lora(1536, 256)]})
    whole = run(task, patched_job(checkpoint, patches))
    monkeypatch.setattr(Sizes, "choose", lambda sizes, free: placement)
    for first, second in ((patches, None), (None, patches)):
        tight = DenoiseTask(torch.device("cpu"))
        run(tight, patched_job(checkpoint, first))
        assert tight.placement == placement
        result = run(tight, patched_job(checkpoint, second))
        assert torch.equal(result, whole) == (second is patches)
        assert torch.equal(run(tight, patched_job(checkpoint, patches)), whole)


def test_a_cancel_while_patches_change_leaves_weights_that_the_next_step_completes(checkpoint, task):
    patches = Patches.make(checkpoint, TOUCHED)
    expected = run(task, patched_job(checkpoint, patches))
    original = run(task, patched_job(checkpoint, None))

    class Late(JobWatch):
        """Cancels after three weights."""

        calls = 0

        def cancelled(self) -> bool:
            self.calls += 1
            return self.calls > 3

    for job, result in ((patched_job(checkpoint, patches), expected), (patched_job(checkpoint, None), original)):
        for load in job.loads:
            task.load(load.fields, load.inputs, JobWatch())
        with pytest.raises(Cancelled):
            task.load(job.fields | {"dtype": "float32"}, {}, Late())
        assert torch.equal(run(task, job), result)


def test_16_bit_weights_are_rounded_once_more_after_a_merge(weights, tmp_path, task):
    key = f"{BLOCK}.txt_mlp.0.weight"
    halves = {name: tensor.half() for name, tensor in weights.items()}
    save_file(halves, tmp_path / "model.safetensors")
    checkpoint = open_transformer(tmp_path / "model.safetensors")
    run(task, patched_job(checkpoint, Patches.make(checkpoint, {key: [lora(1024, 256)]})))
    expected = merge(halves[key].float(), [lora(1024, 256)]).half().float()
    found = task.transformer.model.transformer_blocks[1].ff_context.net[0].proj.weight
    assert torch.equal(found, expected)


def test_8_bit_weights_are_patched_in_their_true_size_and_not_rounded_again(weights, tmp_path, task):
    layer = f"{BLOCK}.txt_mlp.0"
    small, scale = (weights[f"{layer}.weight"] * 64).to(torch.float8_e4m3fn), torch.tensor(1 / 64)
    path = tmp_path / "model.safetensors"
    save_file(weights | {f"{layer}.weight": small, f"{layer}.scale_weight": scale}, path)
    checkpoint = open_transformer(path)
    patches = [lora(1024, 256), Patch("diff", 0.5, 0.9, {"diff": draw(1024, 256)})]
    run(task, patched_job(checkpoint, Patches.make(checkpoint, {f"{layer}.weight": patches})))
    found = task.transformer.model.transformer_blocks[1].ff_context.net[0].proj.weight
    assert torch.equal(found, merge(small.float() * scale, patches))


def test_patches_travel_as_they_are(checkpoint):
    patches = Patches.make(checkpoint, TOUCHED, torch.float16)
    dtype, found = read_patches(patches.file.path, patches.numbers)
    assert dtype == torch.float16 and found.keys() == TOUCHED.keys()
    for key, originals in TOUCHED.items():
        for one, other in zip(found[key], originals, strict=True):
            assert (one.kind, one.strength, one.strength_model, one.alpha) == (
                other.kind,
                other.strength,
                1.0,
                other.alpha,
            )
            assert all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())


@pytest.mark.parametrize(
    ("patches", "words"),
    [
        (
            {"double_blocks.2.img_mlp.0.bias": [Patch("set", tensors={"value": draw(1024)})]},
            "no weight 'double_blocks.2",
        ),
        ({"img_in.proj.bias": [Patch("glora", tensors={"a": draw(256)})]}, "'glora' is not a kind of patch"),
        (
            {"img_in.proj.bias": [Patch("set", tensors={"value": draw(255)})]},
            r"with value \[255\] does not fit \[256\]",
        ),
        ({"img_in.proj.bias": [Patch("diff", tensors={"diff": draw(1)})]}, r"with diff \[1\] does not fit \[256\]"),
        ({"img_in.proj.bias": [Patch("diff", tensors={})]}, "lacks diff"),
        ({f"{BLOCK}.img_mlp.0.weight": [lora(1024, 255)]}, "does not fit"),
        ({f"{BLOCK}.img_mlp.0.weight": [Patch("lokr", tensors={"w1": draw(3, 2)})]}, "lacks w2 or w2_a, w2 or w2_b"),
        ({f"{BLOCK}.img_mlp.0.weight": [lora(1024, 256, float("nan"))]}, "must be finite"),
        ({f"{BLOCK}.img_mlp.0.weight": [Patch("lora", tensors=SMALL | {"extra": draw(1)})]}, "has 'extra'"),
    ],
)
def test_patches_that_ranks_cannot_merge_are_refused(patches, words, checkpoint):
    with pytest.raises(ValueError, match=words):
        Patches.make(checkpoint, patches)


def test_checkpoints_of_diffusers_take_no_patches(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="in the layout of ComfyUI's files"):
        Patches.make(open_transformer(tmp_path), {})
