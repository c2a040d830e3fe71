"""Core's stock HunyuanVideo-1.5 graphs, with core's own loaders and nodes, and with this pack's decode nodes.

The transformers are small; the VAE has its full size, because core's VAELoader assumes the full widths. Core's text
encoders cannot be made small, so a node that exists only in these tests provides the conditioning. CLIP vision, the
latent upscaler and EasyCache of the stock graphs are left out. All objects that this pack's nodes receive are core's.

Frames of several latent frames show that ranks have decoded: core's own decoder gives a different result, because it
omits the frame-causal mask.
"""

import subprocess
import sys

import numpy as np
import psutil
import pytest

from comfyui_host import Host, node
from set_up import ROOT, comfyui_path

CONDITIONING = """
import torch

class SmallConditioning:
    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        generator = torch.Generator().manual_seed(seed)
        text, glyphs = torch.randn(1, 8, 3584, generator=generator), torch.randn(1, 4, 1472, generator=generator)
        return ([[text, {"conditioning_byt5small": glyphs, "pooled_output": torch.zeros(1, 768)}]],)

NODE_CLASS_MAPPINGS = {"SmallConditioning": SmallConditioning}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with small models and a full-size VAE."""
    if psutil.virtual_memory().available < 14 * 2**30:
        pytest.skip("the full-size VAE, in ComfyUI and on a rank, needs 14 GiB of memory")
    base = tmp_path_factory.mktemp("core")
    subprocess.run([sys.executable, "-m", "tests.host.small_core_models", base / "models"], check=True, cwd=ROOT)
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "small_conditioning.py").write_text(CONDITIONING)
    host = Host(base)
    try:
        yield host.wait()
    finally:
        host.close()
        (base / "models" / "vae" / "full_size.safetensors").unlink()  # 2.5 GB


OURS = {"rank_group": ["ranks", 0], "mode": "seamless", "tile_size": 256, "overlap": 64}


def stock(prompt: dict, decode: dict, model: str) -> dict:
    """Return one of the API prompts of core's graphs with small models and pictures as its output.

    decode: the node that decodes. model: "unet", or "model_on_ranks" for sampling on ranks.
    """
    graph = {key: node for key, node in prompt.items() if key not in ("clip", "video", "vision_model", "vision")}
    graph["unet"]["inputs"]["unet_name"] = "small_t2v.safetensors"
    graph["vae"]["inputs"]["vae_name"] = "full_size.safetensors"
    graph["ranks"]["inputs"]["devices"] = "cpu"
    graph["shift"]["inputs"]["model"] = [model, 0]
    graph["sigmas"]["inputs"]["steps"] = 2
    graph["latent"]["inputs"] |= {"width": 32, "height": 32, "length": 5}
    graph["latent"]["inputs"].pop("clip_vision_output", None)
    graph |= {
        "positive": node("SmallConditioning", seed=1),
        "negative": node("SmallConditioning", seed=2),
        "image": node("EmptyImage", width=48, height=48, batch_size=1, color=0x4080C0),
        "decode": decode,
        "save": node("SaveImage", images=["decode", 0], filename_prefix="core"),
    }
    if decode["class_type"] == "HV15DistributedVAEDecode":
        decode["inputs"] |= OURS
    return graph


@pytest.fixture
def text_to_video(prompt):
    return lambda decode, model="unet": stock(prompt("core_text_to_video"), decode, model)


@pytest.fixture
def image_to_video(prompt):
    def build(decode: dict, vae: str, model: str = "unet") -> dict:
        graph = stock(prompt("core_image_to_video"), decode, model)
        graph["latent"]["inputs"]["vae"] = [vae, 0]
        return graph

    return build


def with_distribute_vae() -> dict:
    return node("VAEDecode", samples=["sample", 0], vae=["vae_on_ranks", 0])


def with_decode_node() -> dict:
    return node("HV15DistributedVAEDecode", samples=["sample", 0], vae=["vae", 0])


def pictures(server: Host, graph: dict) -> np.ndarray:
    run = server.run(graph)
    assert run.error is None, run.error["exception_message"]
    return server.pictures(run)


@pytest.mark.timeout(600)
def test_cores_text_to_video_graph_runs_with_distribute_vae_and_with_the_decode_node(server, text_to_video):
    frames = pictures(server, text_to_video(with_distribute_vae()))
    assert frames.shape == (5, 32, 32, 3) and frames.std() > 1
    assert np.array_equal(pictures(server, text_to_video(with_decode_node())), frames)
    keeps_path = "cached_patcher_init" in (comfyui_path() / "comfy" / "sd.py").read_text()  # then ranks map the file
    assert ("HunyuanVideo-1.5 VAE in memory (core layout)" in server.log.read_text()) is not keeps_path


@pytest.mark.timeout(600)
def test_cores_image_to_video_graph_runs_with_distribute_vae_and_with_the_decode_node(server, image_to_video):
    frames = pictures(server, image_to_video(with_distribute_vae(), "vae_on_ranks"))
    assert frames.shape == (5, 32, 32, 3) and frames.std() > 1
    assert np.array_equal(pictures(server, image_to_video(with_decode_node(), "vae")), frames)


@pytest.mark.timeout(600)
def test_cores_super_resolution_and_tiled_decode_run_with_distribute_vae(server, text_to_video):
    options = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    graph = text_to_video(node("VAEDecodeTiled", samples=["second", 0], vae=["vae_on_ranks", 0], **options))
    graph["sr"] = node(
        "HunyuanVideo15SuperResolution",
        positive=["positive", 0],
        negative=["negative", 0],
        vae=["vae_on_ranks", 0],
        start_image=["image", 0],
        latent=["sample", 0],
        noise_augmentation=0.7,
    )
    graph["sr_unet"] = node("UNETLoader", unet_name="small_sr.safetensors", weight_dtype="default")
    graph["second"] = node(
        "KSampler",
        model=["sr_unet", 0],
        positive=["sr", 0],
        negative=["sr", 1],
        latent_image=["sr", 2],
        seed=4,
        steps=1,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    frames = pictures(server, graph)
    assert frames.shape == (5, 32, 32, 3)
    graph["decode"] = with_decode_node()
    graph["decode"]["inputs"] |= {"samples": ["second", 0], "rank_group": ["ranks", 0]}
    graph["decode"]["inputs"] |= {"mode": "tiled", "tile_size": 64, "overlap": 16}
    assert np.array_equal(pictures(server, graph), frames)


@pytest.mark.timeout(600)
def test_decodes_work_after_unloading_and_after_a_stop(server, text_to_video):
    frames = pictures(server, text_to_video(with_decode_node()))
    graph = text_to_video(with_distribute_vae())
    for number, action in enumerate(("free", "stop")):
        if action == "free":
            server.post("/free", {"unload_models": True, "free_memory": True})
        else:
            (group,) = server.get("/hv15/groups")
            server.post(f"/hv15/groups/{group['id']}/{action}")
        graph["decode"]["inputs"]["_"] = number  # a changed input, so that ComfyUI does not use its cache
        graph["save"]["inputs"]["filename_prefix"] = f"core{number}"
        assert np.array_equal(pictures(server, graph), frames), action


@pytest.mark.timeout(600)
def test_cores_graphs_sample_on_ranks_with_distribute_model(server, text_to_video, image_to_video):
    for graph in (
        lambda model: text_to_video(with_distribute_vae(), model),
        lambda model: image_to_video(with_distribute_vae(), "vae", model),
    ):
        expected, run = pictures(server, graph("unet")), server.run(graph("model_on_ranks"))
        assert run.error is None, run.error["exception_message"]
        frames = server.pictures(run)
        assert np.abs(frames.astype(int) - expected).max() <= 1  # of 255, by rounding
        assert {event["job"] for event in run.events} >= {"denoise", "decode"}
        assert len({event["id"] for event in run.events}) == 1, "one group does both"
