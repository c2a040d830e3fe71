"""Core's samplers with a MODEL whose forward runs on ranks: the latents of the same MODEL without ranks."""

import gc
import importlib
import re
import shutil
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from core_samplings import conditioning, custom_sample, in_scaled_fp8, ksample, write_transformer
from safetensors.torch import load_file, save_file

POSITIVE, NEGATIVE = conditioning(1), conditioning(2)
SHORT = conditioning(3, tokens=4, glyphs=0)
"""A text of another length."""


@pytest.fixture(scope="module")
def files(pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    return {
        "t2v": write_transformer(folder / "t2v.safetensors"),
        "sr": write_transformer(folder / "sr.safetensors", in_channels=98, meanflow=True),
    }


@pytest.fixture(scope="module")
def load(files):
    from comfy.sd import load_diffusion_model

    return lambda name="t2v": load_diffusion_model(str(files[name]))


@pytest.fixture(scope="module")
def model(load):
    return load()


@pytest.fixture(scope="module")
def groups(pack):
    groups = importlib.import_module("hv15_pack.nodes.groups")
    yield groups
    groups.stop_all()


@pytest.fixture(scope="module")
def distribute(pack, groups):
    """A function that does what Distribute Model does."""
    node = importlib.import_module("hv15_pack.nodes.distribute_model").DistributeModel

    def distribute(model, devices="cpu,cpu", **options):
        return node.execute(model, rank_group=groups.GroupDescription(devices), **options).args[0]

    return distribute


@pytest.fixture(autouse=True)
def jobs(groups, monkeypatch):
    """Return the list of the numbers of branches of the jobs that ran on ranks."""
    seen = []
    run = groups.RankGroup.run

    def count(group, job, **options):
        seen.append(len(job.conditions))
        return run(group, job, **options)

    monkeypatch.setattr(groups.RankGroup, "run", count)
    return seen


def assert_same(result, expected):
    assert result.shape == expected.shape
    assert (result - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu", "cpu,cpu,cpu", "cpu,cpu,cpu,cpu"])
def test_any_number_of_ranks_gives_the_models_latents(model, distribute, groups, jobs, monkeypatch, devices):
    monkeypatch.setattr(groups, "check_cpu_ranks", lambda devices: None)  # this machine may have fewer cores
    distributed = distribute(model, devices)
    for negative in (NEGATIVE, SHORT):
        assert_same(ksample(distributed, POSITIVE, negative), ksample(model, POSITIVE, negative))
    # Equal lengths: core computes both branches at once. Others: the first step shows which branch follows which.
    assert jobs == [2, 2, 2, 2, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2s_ancestral", "uni_pc", "res_multistep"])
@pytest.mark.parametrize("negative", [NEGATIVE, SHORT])
def test_samplers_need_not_know(model, distribute, sampler, negative):
    options = {"sampler": sampler}
    assert_same(
        ksample(distribute(model), POSITIVE, negative, **options), ksample(model, POSITIVE, negative, **options)
    )


def guiders(model):
    from comfy_extras.nodes_custom_sampler import BasicGuider, CFGGuider
    from comfy_extras.nodes_perpneg import PerpNegGuider

    empty = conditioning(4, tokens=5, glyphs=0)
    yield CFGGuider.execute(model, POSITIVE, SHORT, 6.0).args[0]
    yield BasicGuider.execute(model, POSITIVE).args[0]
    yield PerpNegGuider.execute(model, POSITIVE, SHORT, empty, 6.0, 1.0).args[0]


def test_guiders_need_not_know(model, distribute, jobs):
    for own, other in zip(guiders(model), guiders(distribute(model)), strict=True):
        assert_same(custom_sample(other), custom_sample(own))
    assert 2 in jobs and 1 in jobs


@pytest.mark.parametrize("sampler", ["euler", "dpm_2"])
def test_the_groups_status_shows_the_step(model, distribute, monkeypatch, sampler):
    from hv15_pack.distributed import RankGroup

    steps, run = [], RankGroup.run
    monkeypatch.setattr(
        RankGroup, "run", lambda group, job, **options: steps.append(options["step"]) or run(group, job, **options)
    )
    ksample(distribute(model), POSITIVE, NEGATIVE, sampler=sampler, steps=3)
    assert steps == sorted(steps) and set(steps) == {(1, 3), (2, 3), (3, 3)}


def test_no_guidance_is_one_branch(model, distribute, jobs):
    assert_same(ksample(distribute(model), POSITIVE, NEGATIVE, cfg=1.0), ksample(model, POSITIVE, NEGATIVE, cfg=1.0))
    assert jobs == [1] * 4


def test_guidance_that_ends_within_a_sampling_leaves_one_branch(model, distribute, jobs):
    import comfy.samplers

    class EarlyGuider(comfy.samplers.CFGGuider):
        def __init__(self, model):
            super().__init__(model)
            self.set_conds(POSITIVE, SHORT)
            self.scales = iter([6.0, 6.0, 1.0, 1.0, 1.0, 6.0])

        def predict_noise(self, *args, **options):
            self.set_cfg(next(self.scales))
            return super().predict_noise(*args, **options)

    assert_same(custom_sample(EarlyGuider(distribute(model)), steps=6), custom_sample(EarlyGuider(model), steps=6))
    # The first step without guidance computes one branch in vain.
    assert jobs == [1, 1, 2, 2, 1, 1, 1, 1]


def test_two_videos_at_once(model, distribute):
    positive, negative = conditioning(1, videos=2), conditioning(2, videos=2)
    for other in (negative, SHORT):
        expected = ksample(model, positive, other, videos=2)
        assert_same(ksample(distribute(model), positive, other, videos=2), expected)


def test_a_text_with_masked_tokens(model, distribute):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    positive = conditioning(1, glyphs=0, attention_mask=mask)
    assert_same(ksample(distribute(model), positive, SHORT), ksample(model, positive, SHORT))


class Vision:
    """A CLIP_VISION_OUTPUT."""

    penultimate_hidden_states = torch.randn(1, 6, 1152, generator=torch.Generator().manual_seed(7))
    last_hidden_state = penultimate_hidden_states

    def __getitem__(self, key):
        return getattr(self, key)


def test_image_to_video(model, distribute):
    image, mask = torch.randn(1, 32, 3, 4, 6), torch.ones(1, 1, 3, 4, 6)
    mask[:, :, :1] = 0
    entries = {"concat_latent_image": image, "concat_mask": mask, "clip_vision_output": Vision()}
    for negative in (conditioning(2, **entries), conditioning(2, tokens=4, **entries), SHORT):
        positive = conditioning(1, **entries)
        assert_same(ksample(distribute(model), positive, negative), ksample(model, positive, negative))


def test_super_resolution_with_a_second_time(load, distribute):
    model = load("sr")
    entries = {"concat_latent_image": torch.randn(1, 66, 3, 4, 6)}
    positive, negative = conditioning(1, **entries), conditioning(2, **entries)
    for sampler in ("euler", "dpm_2"):
        expected = ksample(model, positive, negative, sampler=sampler)
        assert_same(ksample(distribute(model), positive, negative, sampler=sampler), expected)


def shifted(model, shift):
    """Do what core's node ModelSamplingSD3 does. Its module cannot be imported here."""
    from comfy import model_sampling

    class Sampling(model_sampling.ModelSamplingDiscreteFlow, model_sampling.CONST):
        pass

    clone, sampling = model.clone(), Sampling(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    clone.add_object_patch("model_sampling", sampling)
    return clone


def other_nodes():
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    def compiled(model):
        clone = model.clone()
        set_torch_compile_wrapper(model=clone, backend="eager")
        return clone

    cached = {"start_percent": 0.1, "end_percent": 0.95, "verbose": False}
    return {
        "EasyCache": lambda model: EasyCacheNode.execute(model, 0.5, **cached).args[0],
        "LazyCache": lambda model: LazyCacheNode.execute(model, 0.5, **cached).args[0],
        "TorchCompileModel": compiled,
        "ModelSamplingSD3": lambda model: shifted(model, 3.0),
    }


@pytest.mark.parametrize("name", ["EasyCache", "LazyCache", "TorchCompileModel", "ModelSamplingSD3"])
def test_other_model_nodes_work_before_and_after(load, distribute, jobs, name):
    model, apply = load(), other_nodes()[name]
    for negative in (NEGATIVE, SHORT):
        expected = ksample(apply(model), POSITIVE, negative, steps=8)
        jobs.clear()
        assert_same(ksample(apply(distribute(model)), POSITIVE, negative, steps=8), expected)
        after = list(jobs)
        jobs.clear()
        assert_same(ksample(distribute(apply(model)), POSITIVE, negative, steps=8), expected)
        assert jobs == after
        assert (sum(jobs) < 16) == name.endswith("Cache")  # skipped steps do not reach the ranks
    if name != "TorchCompileModel":
        assert not torch.equal(expected, ksample(model, POSITIVE, SHORT, steps=8))


def test_models_of_one_loader_are_used_in_turn(model, distribute, jobs):
    changed = shifted(model, 2.0)
    plain, expected = ksample(model, POSITIVE, SHORT), ksample(changed, POSITIVE, SHORT)
    one, other = distribute(model), distribute(changed)
    for _ in range(2):
        assert_same(ksample(one, POSITIVE, SHORT), plain)
        assert_same(ksample(other, POSITIVE, SHORT), expected)
        jobs.clear()
        assert torch.equal(ksample(model, POSITIVE, SHORT), plain)
        assert not jobs


def test_the_model_is_not_loaded_and_nothing_is_left_on_it(load, distribute):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    model = load()
    network, distributed = model.model.diffusion_model, distribute(model)
    before = dict(vars(network))
    ksample(distributed, POSITIVE, SHORT)
    assert not any(entry.model is distributed for entry in comfy.model_management.current_loaded_models)
    assert dict(vars(network)) == before
    gone = weakref.ref(network)
    gc.collect()
    gc.disable()
    try:
        del model, network, distributed, before
        assert gone() is None, "a reference cycle keeps the weights until the garbage collector runs"
    finally:
        gc.enable()


@pytest.fixture
def events(groups, monkeypatch):
    """Return the list of what a sampling does to ComfyUI's models: in every job, ranks request what room they may."""
    import comfy.model_management

    seen = []
    node = importlib.import_module("hv15_pack.nodes.distribute_model")
    run = groups.RankGroup.run

    def request(group, job, make_room=None, **options):
        seen.append("job")
        if make_room:
            make_room()
        return run(group, job, **options)

    monkeypatch.setattr(groups.RankGroup, "run", request)
    monkeypatch.setattr(node, "make_room", lambda group: seen.append("room"))
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models: seen.append(models))
    return seen


def test_only_the_first_step_may_request_room(model, distribute, events):
    ksample(distribute(model), POSITIVE, NEGATIVE)
    assert events == ["job", "room", "job", "job", "job"]


def test_further_models_of_a_sampling_are_loaded_after_room_was_made(model, distribute, events, monkeypatch):
    import comfy.sampler_helpers

    further = [model.clone()]
    monkeypatch.setattr(comfy.sampler_helpers, "get_additional_models_from_model_options", lambda options: further)
    ksample(distribute(model), POSITIVE, NEGATIVE)
    assert events == ["room", further, "job", "job", "job", "job"]


def test_an_unload_within_a_run_does_not_take_the_ranks_away(model, distribute, jobs):
    import comfy.model_management

    expected = ksample(model, POSITIVE, SHORT)
    jobs.clear()
    result = ksample(distribute(model), POSITIVE, SHORT, callback=lambda *_: comfy.model_management.unload_all_models())
    assert_same(result, expected)
    assert sum(jobs) == 8


def test_an_exception_or_interruption_leaves_everything_as_it_was(model, distribute, jobs, groups):
    import comfy.model_management

    expected, distributed = ksample(model, POSITIVE, SHORT), distribute(model)
    network = model.model.diffusion_model
    before = dict(vars(network))

    def fail(step, *_):
        if step == 1:
            raise RuntimeError("stop here")

    def interrupt(step, *_):
        if step == 1:
            comfy.model_management.interrupt_current_processing()

    for callback, error in (
        (fail, RuntimeError),
        (interrupt, comfy.model_management.InterruptProcessingException),
    ):
        (group,) = (group for group in groups.all_groups() if len(group.devices) == 2)
        pids = [rank["pid"] for rank in group.status()["ranks"]]
        with pytest.raises(error):
            ksample(distributed, POSITIVE, SHORT, callback=callback)
        assert dict(vars(network)) == before
        assert_same(ksample(distributed, POSITIVE, SHORT), expected)
        assert [rank["pid"] for rank in group.status()["ranks"]] == pids


def test_a_sampling_that_ranks_cannot_compute_runs_in_comfyuis_process(pack, model, distribute, jobs, monkeypatch):
    said = []
    progress = importlib.import_module("hv15_pack.nodes.progress").Progress
    monkeypatch.setattr(progress, "tell", lambda self, message: said.append(message))
    changed = distribute(model)
    changed.model_options["transformer_options"]["patches_replace"] = {
        "dit": {("double_block", 0): lambda args, extra: extra["original_block"](args)}
    }
    expected = ksample(model, POSITIVE, SHORT)
    jobs.clear()
    assert_same(ksample(changed, POSITIVE, SHORT), expected)
    assert not jobs
    assert said == ["This sampling runs in ComfyUI's process: ranks cannot compute replaced or patched blocks (dit)."]


LAYER = "diffusion_model.double_blocks.{}.{}"


def adapters(kind: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file with an adapter of this kind for some of the layers."""
    generator, found = torch.Generator().manual_seed(9), {}

    def draw(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    for layer, (rows, columns) in {
        LAYER.format(0, "img_attn.qkv"): (384, 128),
        LAYER.format(0, "txt_mlp.0"): (512, 128),
        LAYER.format(1, "img_attn.proj"): (128, 128),
    }.items():
        if kind == "lora":
            found |= {f"{layer}.lora_up.weight": draw(rows, 4), f"{layer}.lora_down.weight": draw(4, columns)}
            found[f"{layer}.alpha"] = torch.tensor(2.0)
        elif kind == "lokr":
            found |= {f"{layer}.lokr_w1": draw(8, 8), f"{layer}.lokr_w2": draw(rows // 8, columns // 8)}
        elif kind == "lora of other sizes":  # core skips one layer of it
            rows += 8 * layer.endswith("txt_mlp.0")
            found |= {f"{layer}.lora_up.weight": draw(rows, 4), f"{layer}.lora_down.weight": draw(4, columns)}
        elif kind == "diff":
            found |= {f"{layer}.diff": draw(rows, columns), f"{layer}.diff_b": draw(rows)}
        else:  # only core merges this kind
            found |= {f"{layer}.a1.weight": draw(4, columns), f"{layer}.a2.weight": draw(columns, 4)}
            found |= {f"{layer}.b1.weight": draw(4, columns), f"{layer}.b2.weight": draw(rows, 4)}
            found[f"{layer}.alpha"] = torch.tensor(4.0)
    return found


def patched(model, kind, strength=0.7):
    """Do what LoraLoaderModelOnly does."""
    from comfy.sd import load_lora_for_models

    return load_lora_for_models(model, None, adapters(kind), strength, 0)[0]


@pytest.mark.parametrize("kind", ["lora", "lora of other sizes", "lokr", "diff", "glora"])
def test_adapters_apply_before_and_after(model, distribute, kind):
    plain = ksample(distribute(model), POSITIVE, SHORT)
    for strength in (0.7, -0.2):
        expected = ksample(patched(model, kind, strength), POSITIVE, SHORT)
        assert_same(ksample(distribute(patched(model, kind, strength)), POSITIVE, SHORT), expected)
        assert_same(ksample(patched(distribute(model), kind, strength), POSITIVE, SHORT), expected)
        assert (expected - plain).norm() / plain.norm() > 1e-3
    assert torch.equal(ksample(distribute(model), POSITIVE, SHORT), plain)


def test_adapters_travel_while_another_clone_is_loaded(model, distribute):
    import comfy.model_management

    plain, lora = ksample(model, POSITIVE, SHORT), patched(model, "lora")
    expected = ksample(lora, POSITIVE, SHORT)  # it stays loaded, with changed weights in the network
    assert_same(ksample(distribute(model), POSITIVE, SHORT), plain)
    assert_same(ksample(distribute(lora), POSITIVE, SHORT), expected)
    comfy.model_management.unload_all_models()


def test_a_second_adapter_moves_no_weights(model, distribute, jobs, monkeypatch):
    from hv15_pack.distributed import RankGroup

    distributed = distribute(model)
    ksample(distributed, POSITIVE, SHORT, steps=1)
    sent, share = [], RankGroup._share
    monkeypatch.setattr(
        RankGroup,
        "_share",
        lambda group, tensors: sent.append(sum(t.nbytes for t in tensors.values())) or share(group, tensors),
    )
    for strength in (0.3, 0.4, 0.3):
        ksample(patched(distributed, "lora", strength), POSITIVE, SHORT, steps=1)
    weights = sum(tensor.nbytes for tensor in model.model.diffusion_model.state_dict().values())
    assert sent and max(sent) < weights / 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_are_used_in_the_dtype_in_which_core_keeps_them(pack, files, distribute, tmp_path, dtype):
    from comfy.sd import load_diffusion_model

    options = {"dtype": dtype} if dtype.itemsize == 1 else {}
    path = files["t2v"] if options else write_transformer(tmp_path / "stored.safetensors", dtype)
    model = load_diffusion_model(str(path), options)
    expected = ksample(model, POSITIVE, SHORT)
    tolerance = 1e-5 if model.model.get_dtype() is torch.float32 or options else 2e-2
    result = ksample(distribute(model), POSITIVE, SHORT)
    assert (result - expected).norm() / expected.norm() < tolerance


def test_a_file_that_replaces_the_models_is_not_read(files, distribute, tmp_path):
    from comfy.sd import load_diffusion_model

    path, other = (Path(shutil.copy(files["t2v"], tmp_path / name)) for name in ("model.safetensors", "other"))
    save_file({key: 2 * tensor for key, tensor in load_file(path).items()}, other)
    model = load_diffusion_model(str(path))
    expected = ksample(model, POSITIVE, SHORT)
    model.cached_patcher_init = load_diffusion_model, (str(path), {})  # as in ComfyUI 0.33
    distributed = distribute(model)
    distributed.cached_patcher_init = model.cached_patcher_init
    other.replace(path)
    assert_same(ksample(distributed, POSITIVE, SHORT), expected)


def test_scaled_8_bit_files(files, distribute, tmp_path):
    from comfy.sd import load_diffusion_model

    model = load_diffusion_model(str(in_scaled_fp8(files["t2v"], tmp_path / "scaled.safetensors")))
    expected = ksample(model, POSITIVE, SHORT)
    assert_same(ksample(distribute(model), POSITIVE, SHORT), expected)
    unscaled = ksample(load_diffusion_model(str(files["t2v"])), POSITIVE, SHORT)
    assert (unscaled - expected).norm() / expected.norm() > 1e-3


def test_a_killed_rank_does_not_cost_the_sampling(model, distribute, groups, jobs):
    expected, killed = ksample(model, POSITIVE, SHORT), []
    distributed = distribute(model)
    (group,) = (group for group in groups.all_groups() if group.devices == ("cpu", "cpu"))
    group.start(wait=True)

    def kill(step, *_):
        if step == 1:
            killed.append(group.status()["ranks"][1]["pid"])
            psutil.Process(killed[0]).kill()

    assert_same(ksample(distributed, POSITIVE, SHORT, callback=kill), expected)
    assert killed and killed[0] not in [rank["pid"] for rank in group.status()["ranks"]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m.add_object_patch("diffusion_model.pe_embedder", None),
            r"the network's own parts \(.*pe_embedder\)",
        ),
        (lambda m: m.set_injections("bypass_lora", [object()]), "a LoRA in bypass mode"),
        (lambda m: m.add_weight_wrapper("diffusion_model.img_in.proj.weight", None), "wrappers around the weights"),
        (lambda m: m.add_callback("on_load_after", print), "callbacks that change the network"),
        (lambda m: m.set_additional_models("multigpu", [m.clone()]), "MultiGPU clones"),
        (lambda m: m.set_model_attn1_patch(print), r"patched blocks \(attn1_patch\)"),
    ],
)
def test_what_ranks_cannot_compute_is_named(model, distribute, change, words):
    reason_to_stay = importlib.import_module("hv15_pack.nodes.core_limits").reason_to_stay
    clone = distribute(model)
    assert reason_to_stay(clone, {"positive": POSITIVE[0][1:]}, clone.model_options, {}) is None
    change(clone)
    assert re.search(words, reason_to_stay(clone, {"positive": POSITIVE[0][1:]}, clone.model_options, {}))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"control": object()}, "ControlNet"),
        ({"hooks": object()}, "hooks on the conditioning"),
        ({"guiding_frame_index": 0}, "guiding frame"),
        ({"attention_mask": torch.tensor([[0.0, -1.0]])}, "added to attention scores"),
    ],
)
def test_conditions_that_ranks_cannot_compute_are_named(model, entry, words):
    reason_to_stay = importlib.import_module("hv15_pack.nodes.core_limits").reason_to_stay
    assert words in reason_to_stay(model, {"positive": [entry], "negative": None}, {}, {})
    assert "forced load" in reason_to_stay(model, {}, {}, {"force_full_load": True})


def test_other_models_are_refused_by_name(pack, distribute):
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.diffusion_model = torch.nn.Linear(2, 2)

    other = comfy.model_patcher.ModelPatcher(Other(), torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"The model \(Other\) .*HunyuanVideo-1.5's transformer"):
        distribute(other)
    with pytest.raises(ValueError, match="contains no diffusion model"):
        distribute(object())
    with pytest.raises(ValueError, match="memory is -1"):
        distribute(other, memory=-1)
