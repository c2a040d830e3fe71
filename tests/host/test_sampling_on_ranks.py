"""Sampling whose transformer runs on ranks: the latents of sampling in this process, whatever happens to the ranks."""

import copy
import importlib
import json
import threading

import psutil
import pytest
import torch
from safetensors.torch import load_file

SIZE = {"width": 64, "height": 48, "frames": 5, "steps": 3, "guidance": 4.0, "shift": 7.0, "seed": 11}
PROMPTS = {
    "fox": 'a red fox, "hello"',
    "cat": "a cat that sleeps on a warm stone wall in the last light of the evening",
}


@pytest.fixture(scope="module")
def loaded(pack, tiny_folders):
    return {kind: pack.loading.load_pipeline(folder, torch.float32, "model") for kind, folder in tiny_folders.items()}


@pytest.fixture(scope="module")
def groups(pack):
    groups = importlib.import_module("hv15_pack.nodes.groups")
    yield groups
    groups.stop_all()


@pytest.fixture(params=["cpu", "cpu,cpu"], scope="module")
def description(request, groups):
    return groups.GroupDescription(request.param)


def encoded(pack, loaded, prompt="fox"):
    return pack.text.encode(loaded, PROMPTS[prompt], "blurry")


def assert_same(result, expected):
    assert result.shape == expected.shape and result.dtype == torch.float32
    assert (result - expected).norm() / expected.norm() < 1e-5


def test_text_to_video_gives_the_latents_of_one_process(pack, loaded, description):
    pipeline = loaded["t2v"]
    fox, cat = (encoded(pack, pipeline, prompt) for prompt in PROMPTS)
    for texts, changes in ((fox, {}), (cat, {}), (fox, {"seed": 12}), (fox, {"guidance": 1.0}), (fox, {"frames": 1})):
        expected = pack.sampling.sample(pipeline, texts, **SIZE | changes)
        assert_same(pack.sampling.sample(pipeline, texts, **SIZE | changes, rank_group=description), expected)


def test_image_to_video_gives_the_latents_of_one_process(pack, loaded, description):
    pipeline = loaded["i2v"]
    texts, image = encoded(pack, pipeline), torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(3))
    expected = pack.sampling.sample(pipeline, texts, **SIZE, start_image=image)
    on_ranks = pack.sampling.sample(pipeline, texts, **SIZE, start_image=image, rank_group=description)
    assert_same(on_ranks, expected)
    other = pack.sampling.sample(pipeline, texts, **SIZE, start_image=1 - image, rank_group=description)
    assert (other - expected).norm() / expected.norm() > 1e-3


def test_the_first_step_may_request_room(pack, loaded, groups, monkeypatch):
    denoising = importlib.import_module("hv15_pack.nodes.denoising")
    requested, made = [], []
    run = groups.RankGroup.run

    def request(group, job, make_room=None, **options):
        requested.append(make_room is not None)
        if make_room:
            make_room()
        return run(group, job, **options)

    monkeypatch.setattr(groups.RankGroup, "run", request)
    monkeypatch.setattr(denoising, "make_room", made.append)
    texts = encoded(pack, loaded["t2v"])
    pack.sampling.sample(loaded["t2v"], texts, **SIZE, rank_group=groups.GroupDescription("cpu"))
    assert requested == [True, False, False]
    assert made == [groups.live_group(groups.GroupDescription("cpu"))]


def test_each_step_is_reported_and_nothing_of_the_pipeline_is_changed(pack, loaded, groups):
    pipeline, steps = loaded["t2v"], []
    before = (
        dict(vars(pipeline.pipeline)),
        dict(vars(pipeline.pipeline.transformer)),
        dict(vars(pipeline.pipeline.guider)),
    )
    description = groups.GroupDescription("cpu,cpu")
    texts = encoded(pack, pipeline)
    result = pack.sampling.sample(pipeline, texts, **SIZE, rank_group=description, on_step=steps.append)
    assert len(steps) == SIZE["steps"]
    assert_same(steps[-1] / pipeline.pipeline.vae.config.scaling_factor, result)
    assert before == (
        dict(vars(pipeline.pipeline)),
        dict(vars(pipeline.pipeline.transformer)),
        dict(vars(pipeline.pipeline.guider)),
    )


def test_the_transformer_stays_off_comfyuis_device(pack, loaded, groups, monkeypatch):
    wanted, load = [], pack.loading.comfy.model_management.load_models_gpu

    def note(models, *args, **options):
        wanted.extend(models)
        return load(models, *args, **options)

    monkeypatch.setattr(pack.loading.comfy.model_management, "load_models_gpu", note)
    pipeline = loaded["i2v"]
    for offload in ("model", "none"):
        monkeypatch.setattr(pipeline, "offload", offload)
        texts, image = encoded(pack, pipeline), torch.rand(1, 48, 64, 3)
        wanted.clear()
        description = groups.GroupDescription("cpu,cpu")
        pack.sampling.sample(pipeline, texts, **SIZE, start_image=image, rank_group=description)
        assert pipeline.patchers["vae"] in wanted and pipeline.patchers["transformer"] not in wanted


@pytest.mark.parametrize(("keep", "state"), [("release", "ready"), ("stop", "stopped")])
def test_what_is_kept_after_a_sampling_is_chosen(pack, loaded, groups, keep, state):
    description = groups.GroupDescription("cpu,cpu", keep_loaded=keep)
    pack.sampling.sample(loaded["t2v"], encoded(pack, loaded["t2v"]), **SIZE, rank_group=description)
    status = groups.live_group(description).status()
    assert status["state"] == state
    folder = str(loaded["t2v"].folder)
    for rank in status["ranks"]:
        assert rank["pid"] is None or not any(folder in m.path for m in psutil.Process(rank["pid"]).memory_maps())


def test_weights_that_are_no_transformers_are_refused_before_ranks_start(pack, loaded, groups, monkeypatch, tmp_path):
    groups.stop_all()
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    monkeypatch.setattr(loaded["t2v"], "folder", tmp_path)
    description = groups.GroupDescription("cpu,cpu")
    with pytest.raises(ValueError, match="holds a 'FluxTransformer2DModel'"):
        pack.sampling.sample(loaded["t2v"], encoded(pack, loaded["t2v"]), **SIZE, rank_group=description)
    assert groups.live_group(description).status()["state"] == "stopped"


@pytest.fixture
def graph(prompt):
    """A sampling on ranks, with its latent saved."""
    graph = {
        key: node for key, node in prompt("text_to_video").items() if key in ("pipeline", "ranks", "text", "sampler")
    }
    graph["sampler"]["inputs"] |= {"width": 160, "height": 96, "frames": 9, "steps": 6, "rank_group": ["ranks", 0]}
    graph["save"] = {"class_type": "SaveLatent", "inputs": {"samples": ["sampler", 0], "filename_prefix": "sampled"}}
    return graph


def saved_latent(host, run):
    assert run.error is None, run.error["exception_message"]
    return load_file(host.saved(run.outputs["save"]["latents"][0]))["latent_tensor"]


def test_a_killed_rank_does_not_cost_the_sampling(host, graph):
    run = host.run(graph)
    expected = saved_latent(host, run)
    assert run.previews > 0
    used, killed = set(), []

    def kill(type, data):
        """Kill a rank at the second step. A suspended rank holds up this step or the next, however short they are."""
        if type == "hv15.group" and data["job"] == "denoise":
            used.add(data["id"])
        elif type == "progress" and data["node"] == "sampler" and not killed:
            group = next(group for group in host.get("/hv15/groups") if group["id"] in used)
            killed.append(psutil.Process(group["ranks"][-1]["pid"]))
            killed[0].suspend()
            threading.Timer(1, killed[0].kill).start()

    again = copy.deepcopy(graph)
    again["ranks"]["inputs"]["stall_timeout"] = 121  # anything that makes ComfyUI run it again
    run = host.run(again, kill)
    assert_same(saved_latent(host, run), expected)
    assert killed and any(event["state"] == "recovering" for event in run.events)
    assert any("retrying the denoising step" in text for text in run.texts)


def test_progress_moves_within_a_step_and_an_interrupt_ends_it(host, graph):
    interrupted = []

    def interrupt(type, data):
        if type == "progress" and data["node"] == "sampler" and 0 < data["value"] < 1 and not interrupted:
            interrupted.append(data["value"])
            host.post("/interrupt")

    # A step of minutes, of which a few blocks are computed.
    graph["sampler"]["inputs"] |= {"width": 1280, "height": 704, "frames": 33, "steps": 1}
    assert host.run(graph, interrupt).interrupted and interrupted
    pids = host.rank_pids()
    graph["sampler"]["inputs"] |= {"width": 64, "height": 48, "frames": 33, "steps": 3}
    assert saved_latent(host, host.run(graph)).shape == (1, 32, 9, 3, 4)
    assert host.rank_pids() == pids
