"""Core's stock HunyuanVideo-1.5 graphs, with core's own loaders and nodes, and with this pack's decode nodes.

The transformers are small; the VAE has its full size, because core's VAELoader assumes the full widths. Core's text
encoders cannot be made small, so a node that exists only in these tests provides the conditioning. CLIP vision, the
latent upscaler and EasyCache of the stock graphs are left out. All objects that this pack's nodes receive are core's.

Frames of several latent frames show that ranks have decoded: core's own decoder gives a different result, because it
omits the frame-causal mask.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from comfyui_host import Host, node
from set_up import comfyui_path

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
    script = Path(__file__).with_name("small_core_models.py")
    subprocess.run([sys.executable, script, comfyui_path(), base / "models"], check=True)
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "small_conditioning.py").write_text(CONDITIONING)
    host = Host(base)
    try:
        yield host.wait()
    finally:
        host.close()
        (base / "models" / "vae" / "full_size.safetensors").unlink()  # 2.5 GB


def stock(latent: dict, conditioning: tuple[list, list], decode: dict) -> dict:
    """Return core's graph from its loaders to pictures. Graphs differ in `latent`, `conditioning` and `decode`."""
    ours = {"rank_group": ["ranks", 0], "mode": "seamless", "tile_size": 256, "overlap": 64}
    if decode["class_type"] == "HV15DistributedVAEDecode":
        decode["inputs"] |= ours
    return {
        "unet": node("UNETLoader", unet_name="small_t2v.safetensors", weight_dtype="default"),
        "shift": node("ModelSamplingSD3", model=["unet", 0], shift=7.0),
        "positive": node("SmallConditioning", seed=1),
        "negative": node("SmallConditioning", seed=2),
        "vae": node("VAELoader", vae_name="full_size.safetensors"),
        "ranks": node(
            "HV15RankGroup",
            devices="cpu",
            backend="auto",
            dtype="auto",
            keep_loaded="keep",
            start_timeout=180,
            stall_timeout=120,
        ),
        "distributed": node("HV15DistributeVAE", vae=["vae", 0], **ours),
        "picture": node("EmptyImage", width=48, height=48, batch_size=1, color=0x4080C0),
        "latent": latent,
        "guider": node("CFGGuider", model=["shift", 0], positive=conditioning[0], negative=conditioning[1], cfg=6.0),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["shift", 0], scheduler="simple", steps=2, denoise=1.0),
        "noise": node("RandomNoise", noise_seed=3),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0 if latent["class_type"].startswith("Empty") else 2],
        ),
        "decode": decode,
        "save": node("SaveImage", images=["decode", 0], filename_prefix="core"),
    }


def text_to_video(decode: dict) -> dict:
    latent = node("EmptyHunyuanVideo15Latent", width=32, height=32, length=5, batch_size=1)
    return stock(latent, (["positive", 0], ["negative", 0]), decode)


def image_to_video(decode: dict, vae: str) -> dict:
    latent = node(
        "HunyuanVideo15ImageToVideo",
        positive=["positive", 0],
        negative=["negative", 0],
        vae=[vae, 0],
        width=32,
        height=32,
        length=5,
        batch_size=1,
        start_image=["picture", 0],
    )
    return stock(latent, (["latent", 0], ["latent", 1]), decode)


def with_distribute_vae() -> dict:
    return node("VAEDecode", samples=["sample", 0], vae=["distributed", 0])


def with_decode_node() -> dict:
    return node("HV15DistributedVAEDecode", samples=["sample", 0], vae=["vae", 0])


def pictures(server: Host, graph: dict) -> np.ndarray:
    run = server.run(graph)
    assert run.error is None, run.error["exception_message"]
    return server.pictures(run)


@pytest.mark.timeout(600)
def test_cores_text_to_video_graph_runs_with_distribute_vae_and_with_the_decode_node(server):
    frames = pictures(server, text_to_video(with_distribute_vae()))
    assert frames.shape == (5, 32, 32, 3) and frames.std() > 1
    assert np.array_equal(pictures(server, text_to_video(with_decode_node())), frames)
    keeps_path = "cached_patcher_init" in (comfyui_path() / "comfy" / "sd.py").read_text()  # then ranks map the file
    assert ("HunyuanVideo-1.5 VAE in memory (core layout)" in server.log.read_text()) is not keeps_path


@pytest.mark.timeout(600)
def test_cores_image_to_video_graph_runs_with_distribute_vae_and_with_the_decode_node(server):
    frames = pictures(server, image_to_video(with_distribute_vae(), "distributed"))
    assert frames.shape == (5, 32, 32, 3) and frames.std() > 1
    assert np.array_equal(pictures(server, image_to_video(with_decode_node(), "vae")), frames)


@pytest.mark.timeout(600)
def test_cores_super_resolution_and_tiled_decode_run_with_distribute_vae(server):
    options = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    graph = text_to_video(node("VAEDecodeTiled", samples=["second", 0], vae=["distributed", 0], **options))
    graph["sr"] = node(
        "HunyuanVideo15SuperResolution",
        positive=["positive", 0],
        negative=["negative", 0],
        vae=["distributed", 0],
        start_image=["picture", 0],
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
def test_decodes_work_after_unloading_and_after_a_stop(server):
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
