"""The pack in a real ComfyUI, driven over its HTTP and websocket API."""

import copy
import json
import time

import numpy as np
import psutil
import pytest
import torch

IDS = [
    "HV15LoadPipeline",
    "HV15LoadVAE",
    "HV15TextEncode",
    "HV15Sampler",
    "HV15RankGroup",
    "HV15DistributedVAEDecode",
    "HV15DistributeVAE",
]


def small(prompt: dict, **decode) -> dict:
    """Return the prompt at a small size."""
    prompt = copy.deepcopy(prompt)
    if "sampler" in prompt:
        prompt["sampler"]["inputs"] |= {"width": 96, "height": 64, "frames": 5, "steps": 3}
    if "latent" in prompt and prompt["latent"]["class_type"].startswith("Empty"):
        prompt["latent"]["inputs"] |= {"width": 96, "height": 64, "length": 5}
    prompt["decode"]["inputs"] |= decode
    return prompt


def saved_frames(prompt: dict) -> dict:
    """Return the prompt with its frames saved as pictures."""
    prompt = {key: node for key, node in prompt.items() if key not in ("video", "save")}
    prompt["save"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["decode", 0], "filename_prefix": "frames"},
    }
    return prompt


def test_all_nodes_are_registered_and_have_a_tooltip_for_each_input(host):
    info = host.get("/object_info")
    assert [id for id in IDS if id not in info] == []
    for id in IDS:
        assert info[id]["category"] == "HunyuanVideo 1.5" and info[id]["description"]
        for inputs in info[id]["input"].values():
            for name, spec in inputs.items():
                assert len(spec) > 1 and spec[1].get("tooltip"), f"{id}.{name} has no tooltip"


@pytest.mark.parametrize("name", ["text_to_video", "image_to_video", "core_nodes"])
def test_an_api_prompt_makes_a_video(host, prompt, name):
    run = host.run(small(prompt(name)))
    assert run.error is None, run.error["exception_message"]
    (video,) = run.outputs["save"]["images"]
    assert (host.base / "output" / video["subfolder"] / video["filename"]).stat().st_size > 1000


def test_a_saved_latent_is_decoded(host, prompt):
    host.save_latent("hv15_example.latent", torch.randn(1, 32, 2, 4, 6))
    assert host.run(small(prompt("decode_saved_latent"))).error is None


def test_tiled_frames_are_the_same_for_one_and_two_ranks(host, prompt):
    results = []
    for devices in ("cpu", "cpu,cpu"):
        graph = saved_frames(small(prompt("text_to_video"), mode="tiled", tile_size=48, overlap=16))
        graph["ranks"]["inputs"]["devices"] = devices
        results.append(host.pictures(host.run(graph)))
    assert results[0].std() > 1
    assert all(np.array_equal(result, results[0]) for result in results)


def test_cores_decode_of_our_latent_gives_the_same_single_frame(host, prompt):
    ours = saved_frames(small(prompt("text_to_video")))
    ours["sampler"]["inputs"]["frames"] = 1
    core = copy.deepcopy(ours)
    core["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["pipeline", 1]}}
    first, second = host.pictures(host.run(ours)), host.pictures(host.run(core))
    assert np.abs(first.astype(int) - second.astype(int)).max() <= 1


def test_cores_tiled_decode_runs_on_the_ranks(host, prompt):
    graph = small(prompt("core_nodes"))
    graph["decode"] = {
        "class_type": "VAEDecodeTiled",
        "inputs": {
            "samples": ["latent", 0],
            "vae": ["distributed", 0],
            "tile_size": 64,
            "overlap": 16,
            "temporal_size": 64,
            "temporal_overlap": 8,
        },
    }
    run = host.run(graph)
    assert run.error is None and any(event["state"] == "busy" for event in run.events)


def test_a_second_prompt_reuses_the_group_and_the_cached_conditioning(host, prompt):
    graph = small(prompt("text_to_video"))
    host.run(graph)
    pids = host.rank_pids()
    graph["sampler"]["inputs"]["seed"] = 77
    run = host.run(graph)
    assert "text" in run.cached
    assert host.rank_pids() == pids


def test_the_group_starts_and_loads_the_weights_while_the_sampler_runs(host, prompt):
    graph = small(prompt("text_to_video"))
    graph["sampler"]["inputs"] |= {"seed": 79, "steps": 40}
    host.stop_groups()
    events = []

    def follow(type, data):
        if type == "hv15.group":
            events.append(data["state"])
        if type == "executing":
            events.append(data["node"])

    run = host.run(graph, follow)
    assert run.error is None
    assert "starting" in events[: events.index("sampler")]
    assert "busy" in events[: events.index("decode", events.index("sampler"))], events


def test_sampling_and_decoding_report_progress(host, prompt):
    graph = small(prompt("text_to_video"))
    graph["sampler"]["inputs"]["seed"] = 78
    run = host.run(graph)
    assert {"sampler", "decode"} <= {node for node, _ in run.progress}
    assert run.previews > 0


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (torch.randn(1, 16, 2, 4, 4), "16 channels"),
        (torch.randn(1, 32, 4, 4), "a video latent is"),
        (torch.full((1, 32, 2, 4, 4), float("nan")), "NaN or infinite"),
    ],
)
def test_a_bad_latent_is_refused_with_a_message_and_the_next_prompt_works(host, prompt, latent, message):
    host.save_latent("bad.latent", latent)
    graph = small(prompt("decode_saved_latent"))
    graph["latent"]["inputs"]["latent"] = "bad.latent"
    run = host.run(graph)
    assert run.error and message in run.error["exception_message"]
    assert host.run(small(prompt("core_nodes"))).error is None


def test_a_missing_device_is_refused_by_name(host, prompt):
    graph = small(prompt("core_nodes"))
    graph["ranks"]["inputs"]["devices"] = "cuda:93"
    run = host.run(graph)
    assert run.error and "cuda:93" in run.error["exception_message"]


def test_invalid_sizes_are_refused_with_the_nearest_valid_ones(host, prompt):
    graph = small(prompt("text_to_video"))
    graph["sampler"]["inputs"]["width"] = 100
    assert "96 or 112" in host.run(graph).error["exception_message"]
    graph["sampler"]["inputs"] |= {"width": 96, "frames": 7}
    assert "5 or 9" in host.run(graph).error["exception_message"]


def test_a_start_image_needs_an_image_to_video_checkpoint(host, prompt):
    graph = small(prompt("image_to_video"))
    graph["pipeline"]["inputs"]["model"] = "tiny (built in)"
    assert "takes no start_image" in host.run(graph).error["exception_message"]


def test_an_interrupt_ends_the_decode_and_keeps_the_ranks(host, prompt):
    host.save_latent("long.latent", torch.randn(1, 32, 40, 12, 16))
    graph = small(prompt("decode_saved_latent"))
    graph["latent"]["inputs"]["latent"] = "long.latent"
    pids = host.rank_pids()
    start = time.monotonic()
    run = host.run(graph, host.interrupt_at("progress", "decode"))
    assert run.interrupted and time.monotonic() - start < 60
    assert host.rank_pids() == pids
    assert host.run(small(prompt("core_nodes"))).error is None


def test_a_killed_rank_does_not_cost_the_prompt(host, prompt):
    host.save_latent("middling.latent", torch.randn(1, 32, 20, 8, 12))
    graph = saved_frames(small(prompt("decode_saved_latent")))
    graph["latent"]["inputs"]["latent"] = "middling.latent"
    expected = host.pictures(host.run(graph))
    graph["decode"]["inputs"]["tile_size"] = 144  # a changed input, so that ComfyUI does not use its cache
    killed = []

    def follow(type, data):
        if type == "progress" and data["node"] == "decode" and not killed:
            busy = next(group for group in host.get("/hv15/groups") if group["state"] == "busy")
            killed.append(busy["ranks"][-1]["pid"])
            psutil.Process(killed[0]).kill()

    run = host.run(graph, follow)
    assert killed and run.error is None
    assert np.array_equal(host.pictures(run), expected)
    assert any(event["state"] == "recovering" for event in run.events)


def test_free_reaches_the_ranks_and_stop_and_restart_work_over_http(host, prompt):
    def loaded():
        pids = [rank["pid"] for group in host.get("/hv15/groups") for rank in group["ranks"] if rank["pid"]]
        return [pid for pid in pids for mapped in psutil.Process(pid).memory_maps() if "hv15_tiny" in mapped.path]

    assert host.run(small(prompt("core_nodes"))).error is None
    assert loaded()
    limit = time.monotonic() + 20
    while loaded():
        assert time.monotonic() < limit, "ranks still hold the weights"
        # Repeated, because ComfyUI ignores it until the next prompt while it collects garbage after a prompt.
        host.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1)
    (group, *_) = [g for g in host.get("/hv15/groups") if len(g["ranks"]) == 2]
    assert json.dumps(group).count("/tmp") == 0
    assert host.post(f"/hv15/groups/{group['id']}/stop")["state"] == "stopped"
    assert host.post(f"/hv15/groups/{group['id']}/restart")["state"] in ("starting", "ready")
    assert "error" in host.post("/hv15/groups/nosuch/stop")
    graph = small(prompt("core_nodes"))
    graph["latent"]["inputs"]["width"] = 112
    assert host.run(graph).error is None
