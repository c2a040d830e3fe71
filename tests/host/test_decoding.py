"""Decoding in a real ComfyUI: every checkpoint layout, core's nodes with this pack's VAE, and refused input."""

import asyncio
import json

import aiohttp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from comfyui_host import node
from distributed.vae.checkpoint import all_tensors, open_checkpoint
from distributed.vae.hunyuanvideo15.layout import to_core

LATENT = torch.randn(1, 32, 2, 3, 4, generator=torch.Generator().manual_seed(3))


def ranks(devices="cpu,cpu", **options):
    defaults = {"backend": "auto", "dtype": "auto", "keep_loaded": "keep", "start_timeout": 180, "stall_timeout": 120}
    return node("HV15RankGroup", devices=devices, **defaults | options)


def graph(vae_name="tiny (built in)", mode="seamless", tile_size=256, overlap=64, **options):
    """Return a prompt that decodes a saved latent with Distributed VAE Decode."""
    return {
        "latent": node("LoadLatent", latent="decoding.latent"),
        "vae": node("HV15LoadVAE", vae_name=vae_name, dtype="float32"),
        "ranks": ranks(**options),
        "decode": node(
            "HV15DistributedVAEDecode",
            samples=["latent", 0],
            vae=["vae", 0],
            rank_group=["ranks", 0],
            mode=mode,
            tile_size=tile_size,
            overlap=overlap,
        ),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="decoding"),
    }


def with_distribute_vae(kind="VAEDecode", **inputs):
    """Return a prompt that decodes it with a core node and the VAE of Distribute VAE."""
    prompt = graph()
    settings = {"mode": "seamless", "tile_size": 256, "overlap": 64}
    prompt["distributed"] = node("HV15DistributeVAE", vae=["vae", 0], rank_group=["ranks", 0], **settings)
    prompt["decode"] = node(kind, samples=["latent", 0], vae=["distributed", 0], **inputs)
    return prompt


@pytest.fixture(scope="module")
def server(host):
    """The host with a saved latent, and with the tiny VAE in every layout."""
    host.save_latent("decoding.latent", LATENT)
    tiny = graph()
    assert host.run(tiny).error is None
    (tiny_vae,) = host.base.glob("user/hv15_tiny/*t2v*/vae")
    weights = all_tensors(open_checkpoint(tiny_vae))
    folder_of_vaes = host.base / "models" / "vae"
    folder_of_vaes.mkdir(exist_ok=True)
    save_file(weights, folder_of_vaes / "diffusers.safetensors")
    save_file({to_core(key): tensor for key, tensor in weights.items()}, folder_of_vaes / "core.safetensors")
    halves = {to_core(key): tensor.half() for key, tensor in weights.items()}
    save_file(halves, folder_of_vaes / "fp16.safetensors")
    save_file(
        {key: tensor for key, tensor in weights.items() if "norm_out" not in key},
        folder_of_vaes / "incomplete.safetensors",
    )
    save_file({"decoder.middle.0.residual.0.gamma": torch.ones(1)}, folder_of_vaes / "wan.safetensors")
    (folder_of_vaes / "renamed.safetensors").write_bytes(b"\x80\x04\x95 the first bytes of a pickle")
    folder = host.base / "models" / "diffusers" / "vae folder"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return host


def frames(server, prompt):
    run = server.run(prompt)
    assert run.error is None, run.error["exception_message"]
    return server.pictures(run)


@pytest.fixture(scope="module")
def expected(server):
    return frames(server, graph())


@pytest.mark.parametrize("name", ["diffusers.safetensors", "core.safetensors", "vae folder"])
def test_every_layout_decodes_to_the_same_frames(server, expected, name):
    assert expected.shape == (5, 48, 64, 3) and expected.std() > 1
    assert np.array_equal(frames(server, graph(name)), expected)


def test_a_half_precision_file_decodes_to_nearly_the_same_frames(server, expected):
    assert np.abs(frames(server, graph("fp16.safetensors")).astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wan.safetensors", "Wan 2.1"),
        ("incomplete.safetensors", "norm_out.gamma"),
        ("renamed.safetensors", "cannot be read as safetensors"),
    ],
)
def test_files_of_other_models_are_refused_and_the_next_prompt_works(server, expected, name, message):
    run = server.run(graph(name))
    assert message in run.error["exception_message"] and run.error["node_type"] == "HV15LoadVAE"
    assert np.array_equal(frames(server, graph()), expected)


def test_cores_decode_with_distribute_vae_gives_the_decode_nodes_frames(server, expected):
    assert np.array_equal(frames(server, with_distribute_vae()), expected)


def test_cores_tile_sizes_are_used(server):
    sizes = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    server.save_latent("decoding.latent", torch.randn(1, 32, 2, 6, 7, generator=torch.Generator().manual_seed(4)))
    try:
        theirs = frames(server, with_distribute_vae("VAEDecodeTiled", **sizes))
        assert np.array_equal(theirs, frames(server, graph(mode="tiled", tile_size=64, overlap=16)))
        assert not np.array_equal(theirs, frames(server, graph(mode="tiled", tile_size=48, overlap=16)))
    finally:
        server.save_latent("decoding.latent", LATENT)


def test_encoding_with_distribute_vae_gives_the_shape_of_cores_encoding(server):
    prompt = with_distribute_vae()
    prompt["image"] = node("EmptyImage", width=64, height=48, batch_size=5, color=0x3377BB)
    for name, vae in (("ours", "distributed"), ("core", "vae")):
        prompt[f"encode_{name}"] = node("VAEEncode", pixels=["image", 0], vae=[vae, 0])
        prompt[f"decode_{name}"] = node("VAEDecode", samples=[f"encode_{name}", 0], vae=["distributed", 0])
        prompt[f"save_{name}"] = node("SaveImage", images=[f"decode_{name}", 0], filename_prefix=name)
    run = server.run(prompt)
    assert run.error is None, run.error["exception_message"]
    pictures = [server.pictures(run, save) for save in ("save_ours", "save_core")]
    # Core's encoder samples from the latent's distribution, so the results differ. test_vae.py compares the numbers.
    assert np.shape(pictures[0]) == np.shape(pictures[1]) == (5, 48, 64, 3)


@pytest.mark.parametrize("change", [{}, {"keep_loaded": "release"}, {"keep_loaded": "stop"}, {"devices": "cpu"}])
def test_decodes_after_a_stop_give_the_same_frames(server, expected, change):
    for _ in range(2):
        assert np.abs(frames(server, graph(**change)).astype(int) - expected).max() <= 1
        server.stop_groups()
        assert {group["state"] for group in server.get("/hv15/groups")} == {"stopped"}
        server.post("/free", {"unload_models": True, "free_memory": True})


def test_a_batch_decodes_to_the_frames_of_each_video_in_order(server, expected):
    server.save_latent("decoding.latent", torch.cat([LATENT, LATENT.flip(0) * 0.5]))
    try:
        both = frames(server, graph())
    finally:
        server.save_latent("decoding.latent", LATENT)
    assert both.shape == (10, 48, 64, 3) and np.array_equal(both[:5], expected)


def test_an_overlap_as_large_as_the_tile_is_refused(server):
    run = server.run(graph(mode="tiled", tile_size=64, overlap=64))
    assert run.error and "overlap" in run.error["exception_message"]


def test_the_routes_accept_known_ids_only_and_reveal_no_paths(server, expected):
    answer = server.get("/hv15/groups")
    assert answer and all(group.keys() >= {"id", "state", "ranks"} for group in answer)
    assert str(server.base) not in json.dumps(answer) and "/tmp" not in json.dumps(answer)

    async def statuses():
        paths = ["/hv15/groups/nosuch/stop", "/hv15/groups/nosuch/restart", f"/hv15/groups/{answer[0]['id']}/kill"]
        async with aiohttp.ClientSession() as session:
            return [(await session.post(server.url + path)).status for path in paths]

    assert asyncio.run(statuses())[:2] == [404, 404] and asyncio.run(statuses())[2] in (404, 405)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 404),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Host": "evil.example:{port}", "Origin": "http://evil.example:{port}"}, 403),
        ({"Host": "localhost:{port}"}, 404),
        ({"Host": "192.168.1.2:{port}"}, 404),
        ({"Host": "studio.example"}, 404),  # behind a proxy
    ],
)
def test_pages_without_an_origin_or_with_a_foreign_name_cannot_stop_a_group(server, headers, status):
    headers = {name: value.format(port=server.port) for name, value in headers.items()}

    async def request():
        url = f"{server.url}/hv15/groups/nosuch/stop"
        async with aiohttp.ClientSession(headers=headers) as session, session.post(url) as answer:
            return answer.status

    assert asyncio.run(request()) == status
