"""The VAE between core and the ranks: core's own classes, at reduced width, beside diffusers and our decoder."""

import copy
import gc
import importlib.util
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (8, 16, 32, 64, 64)
REFINER = "comfy.ldm.hunyuan_video.vae_refiner"


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """The pack's `nodes.vae`, imported as ComfyUI imports it, in this process and on the CPU."""
    from set_up import comfyui_path

    sys.path.append(str(comfyui_path()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.base_directory = str(tmp_path_factory.mktemp("base"))
    spec = importlib.util.spec_from_file_location(
        "hv15_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["hv15_pack"] = importlib.util.module_from_spec(spec)
    return importlib.import_module("hv15_pack.nodes.vae")


def core_model(pack):
    """Core's own model with random weights."""
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    config = {"block_out_channels": list(WIDTHS), "in_channels": 3, "out_channels": 3, "num_res_blocks": 2}
    config |= {"ffactor_spatial": 16, "ffactor_temporal": 4, "z_channels": 32}
    torch.manual_seed(1)
    model = AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.EmptyRegularizer"},
        encoder_config={"target": f"{REFINER}.Encoder", "params": config},
        decoder_config={"target": f"{REFINER}.Decoder", "params": config},
    ).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.02)
    return model


@pytest.fixture
def core(pack, tmp_path):
    """Core's model, and a file of it as core saves one."""
    model = core_model(pack)
    path = tmp_path / "core.safetensors"
    save_file(model.state_dict(), path)
    return SimpleNamespace(model=model, path=path)


def loaded_by_core(model):
    """What core's VAELoader leaves of a file: a VAE whose file nobody knows."""
    import comfy.sd

    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    vae.first_stage_model, vae.latent_channels = model, 32
    return vae


def diffusers_decode(path, latent):
    from diffusers import AutoencoderKLHunyuanVideo15

    from distributed.vae.checkpoint import all_tensors, open_checkpoint

    model = AutoencoderKLHunyuanVideo15(block_out_channels=WIDTHS).eval()
    model.load_state_dict(all_tensors(open_checkpoint(path)))
    with torch.inference_mode():
        return to_frames(model.decode(latent).sample)


def to_frames(video):
    return ((video.movedim(1, -1) + 1) / 2).clamp(0, 1)


def ranks_decode(path, latent):
    """As a single rank decodes."""
    from distributed.vae.checkpoint import decoder_tensors, open_checkpoint
    from distributed.vae.engine import Engine
    from distributed.vae.job import DecodeRequest

    job = DecodeRequest(tuple(latent.shape))
    frames = torch.empty(job.frames_shape)
    watch = SimpleNamespace(progress=lambda done, total: None, cancelled=lambda: False)
    engine = Engine(decoder_tensors(open_checkpoint(path)), torch.device("cpu"), torch.float32)
    engine.decode(job, latent, frames, watch)
    return frames


def latent(frames):
    return torch.randn(1, 32, frames, 3, 4, generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize("frames", [1, 3])
def test_a_core_checkpoint_decodes_on_ranks_as_diffusers_decodes_it(core, frames):
    found, expected = ranks_decode(core.path, latent(frames)), diffusers_decode(core.path, latent(frames))
    assert expected.std() > 0.01
    assert (found - expected).abs().max() <= 1e-5


def test_one_frame_is_core_s_own(core):
    with torch.inference_mode():
        expected = to_frames(core.model.decode(latent(1)))
    assert (ranks_decode(core.path, latent(1)) - expected).abs().max() <= 1e-5


def test_more_frames_differ_from_core_s_by_the_causal_mask_alone(core):
    """Core lets a frame attend to later ones. Given the mask, it is the model that ranks decode."""
    found = ranks_decode(core.path, latent(3))

    def causal(q, k, v):
        batch, channels, *places = q.shape
        q, k, v = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (q, k, v))
        frame = torch.arange(places[0]).repeat_interleave(places[1] * places[2])
        mask = frame[:, None] >= frame[None, :]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.squeeze(1).transpose(1, 2).reshape(batch, channels, *places)

    with torch.inference_mode():
        unmasked = to_frames(core.model.decode(latent(3)))
        core.model.decoder.mid.attn_1.optimized_attention = causal
        masked = to_frames(core.model.decode(latent(3)))
    assert (found - masked).abs().max() <= 1e-5
    assert (found - unmasked).abs().max() > 1e-4


def test_either_layout_becomes_the_vae_that_core_would_have_made(pack, core, tmp_path):
    from distributed.vae.hunyuanvideo15.layout import to_diffusers

    renamed = tmp_path / "diffusers.safetensors"
    save_file({to_diffusers(key): tensor for key, tensor in core.model.state_dict().items()}, renamed)
    image = torch.rand(5, 48, 64, 3)
    with torch.inference_mode():
        # Core's encoder draws from the latent's distribution.
        torch.manual_seed(5)
        expected = core.model.encode(image.movedim(-1, 0).unsqueeze(0) * 2 - 1)
        for path in (core.path, renamed):
            vae = pack.load_vae(path, "float32")
            weights = vae.get_sd()
            assert weights.keys() == core.model.state_dict().keys()
            assert all(torch.equal(weights[key], tensor) for key, tensor in core.model.state_dict().items())
            torch.manual_seed(5)
            assert torch.allclose(vae.encode(image), expected, atol=1e-5)
            assert vae.spacial_compression_decode() == 16 and vae.temporal_compression_decode() == 4
            frames = vae.decode(latent(1))
            assert torch.allclose(frames, to_frames(core.model.decode(latent(1))), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_vae_loads_in_the_dtype_that_was_asked_for(pack, core, tmp_path, dtype):
    path = tmp_path / "half.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in core.model.state_dict().items()}, path)
    for name, wanted in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        vae = pack.load_vae(path, name)
        assert {tensor.dtype for tensor in vae.get_sd().values()} == {wanted}


def test_a_file_on_disk_is_what_ranks_map(pack, core):
    vae = pack.load_vae(core.path)
    assert pack.rank_source(vae) == core.path
    assert pack.rank_source(copy.copy(vae)) == core.path


def test_a_file_that_was_written_over_is_refused_and_loaded_anew(pack, core, monkeypatch):
    """Its pages are mapped: to read them could end the process, as it would where the file is shorter now."""
    monkeypatch.setattr(pack, "vae_path", lambda name: core.path)
    before = pack.LoadVAE.fingerprint_inputs("a file", "auto")
    vae = pack.load_vae(core.path)
    assert pack.LoadVAE.fingerprint_inputs("a file", "auto") == before
    with open(core.path, "r+b") as file:
        file.truncate(core.path.stat().st_size // 2)
    with pytest.raises(ValueError, match="was written over while it was loaded"):
        pack.rank_source(vae)
    save_file({key: tensor * 1.1 for key, tensor in core.model.state_dict().items()}, core.path)
    assert pack.LoadVAE.fingerprint_inputs("a file", "auto") != before


def test_a_file_that_changed_or_went_is_not_what_was_loaded(pack, core):
    vae = pack.load_vae(core.path)
    before = ranks_decode(core.path, latent(1))
    # Replaced as downloads are: the old file's pages stay with those who mapped them.
    other = core.path.with_name("other.safetensors")
    save_file({key: tensor * 1.1 for key, tensor in core.model.state_dict().items()}, other)
    os.replace(other, core.path)
    source = pack.rank_source(vae)
    assert source != core.path and torch.equal(ranks_decode(source, latent(1)), before)
    core.path.unlink()
    assert pack.rank_source(vae) == source


def test_weights_in_memory_are_handed_over_once_wherever_they_move(pack, core):
    vae = loaded_by_core(core.model)
    source = pack.rank_source(vae)
    assert torch.equal(ranks_decode(source, latent(3)), ranks_decode(core.path, latent(3)))
    for parameter in core.model.parameters():  # as when core moves them between devices
        parameter.data = parameter.data.clone()
    assert pack.rank_source(vae) == source == pack.rank_source(copy.copy(vae))


def test_changed_weights_are_handed_over_anew(pack, core):
    vae = loaded_by_core(core.model)
    before = ranks_decode(pack.rank_source(vae), latent(1))
    for parameter in core.model.decoder.parameters():
        parameter.data *= 1.1
    assert not torch.equal(ranks_decode(pack.rank_source(vae), latent(1)), before)


def test_two_vaes_are_never_taken_for_each_other(pack, core):
    """Not even where the second takes the first's place in memory, as a key made of addresses would have it."""
    vae = loaded_by_core(core.model)
    first = ranks_decode(pack.rank_source(vae), latent(1))
    other = loaded_by_core(copy.deepcopy(core.model))
    for parameter in other.first_stage_model.parameters():
        parameter.data *= 1.1
    assert not torch.equal(ranks_decode(pack.rank_source(other), latent(1)), first)
    assert torch.equal(ranks_decode(pack.rank_source(vae), latent(1)), first)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file in a private folder is used")
def test_what_was_handed_over_has_no_name_on_disk_and_goes_with_its_vae(pack, tmp_path):
    vae = loaded_by_core(core_model(pack))
    source = pack.rank_source(vae)
    assert source.is_file() and "(deleted)" in os.readlink(source)
    assert source.stat().st_mode & 0o077 == 0
    del vae
    gc.collect()
    assert not source.exists()


def test_a_diffusers_file_that_core_s_loader_did_not_read_is_found_out(pack, core):
    """Core warns of missing keys and goes on with whatever the memory held."""
    core.model.decoder.mid.block_1.conv1.conv.weight.zero_()
    with pytest.raises(ValueError, match=r"not loaded completely.*Load HunyuanVideo-1\.5 VAE"):
        pack.rank_source(loaded_by_core(core.model))
    core.model.decoder.mid.block_1.conv1.conv.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        pack.rank_source(loaded_by_core(core.model))


def test_another_model_s_vae_is_refused_by_name(pack):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    model = AutoencoderKL(block_out_channels=(32,), **blocks)
    vae = SimpleNamespace(first_stage_model=model, get_sd=model.state_dict)
    with pytest.raises(ValueError, match="Stable Diffusion"):
        pack.rank_source(vae)


def test_a_decoder_alone_is_no_vae_for_core(pack, core, tmp_path):
    weights = {key: tensor for key, tensor in core.model.state_dict().items() if key.startswith("decoder.")}
    save_file(weights, tmp_path / "decoder.safetensors")
    with pytest.raises(ValueError, match="decoder alone"):
        pack.load_vae(tmp_path / "decoder.safetensors")


@pytest.fixture
def asked(pack, monkeypatch):
    """What the drop-in VAE asks of ranks, without any."""
    distribute = importlib.import_module("hv15_pack.nodes.distribute")
    calls = []
    monkeypatch.setattr(distribute, "decode_on_ranks", lambda latent, vae, group, *how: calls.append(how))
    return SimpleNamespace(calls=calls, distributed=distribute.distributed)


def test_the_drop_in_is_a_core_vae_in_everything_but_decoding(pack, core, asked):
    import comfy.model_management
    import comfy.sd

    vae = pack.load_vae(core.path, "float32")
    twin = asked.distributed(vae, None, "seamless", 256, 64, 0)
    again = copy.copy(asked.distributed(twin, None, "tiled", 128, 32, 6))
    assert isinstance(again, comfy.sd.VAE) and again.patcher is vae.patcher
    assert again.get_sd().keys() == vae.get_sd().keys() and pack.rank_source(again) == core.path
    assert type(copy.deepcopy(twin)) is type(twin) and copy.deepcopy(twin).group is None
    twin.decode(latent(1))
    again.decode(latent(1), vae_options={})
    again.decode_tiled(latent(1))
    again.decode_tiled(latent(1), tile_x=8, tile_y=4, overlap=1, tile_t=16, overlap_t=2)
    assert asked.calls == [
        ("seamless", 256, 64, 0),
        ("tiled", 128, 32, 6),
        ("tiled", 128, 32, 6),
        ("tiled", 64, 16, 6),
    ]
    loaded = [model.model for model in comfy.model_management.current_loaded_models]
    assert vae.patcher not in loaded, "core's model was loaded for a decode that ranks do"


def test_what_another_pack_s_kind_of_vae_does_otherwise_the_drop_in_does_too(pack, core, asked):
    vae = pack.load_vae(core.path, "float32")
    odd = type("OddVAE", (type(vae),), {"encode": lambda self, pixels: "encoded oddly", "decode": lambda *_: "not so"})
    vae.__class__ = odd
    twin = asked.distributed(vae, None, "seamless", 256, 64, 0)
    assert isinstance(twin, odd) and twin.encode(None) == "encoded oddly"
    twin.decode(latent(1))
    assert asked.calls == [("seamless", 256, 64, 0)]


@pytest.fixture
def memory(pack, monkeypatch):
    """The module, with no group in it but those of a test."""
    import comfy.model_management

    memory = importlib.import_module("hv15_pack.nodes.memory")
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(memory, "_patchers", {})
    yield memory
    comfy.model_management.unload_all_models()


class ReleasedGroup:
    """Counts how often it is asked for its memory."""

    def __init__(self, *devices: str, decoded: bool = True) -> None:
        self.id, self.devices, self.decoded, self.released = ",".join(devices), devices, decoded, 0

    def release(self) -> None:
        self.released += 1


def test_free_and_memory_pressure_release_the_ranks(memory):
    import comfy.model_management

    group = ReleasedGroup("cpu", "cpu")
    memory.make_room(group)
    memory.make_room(group)
    assert not group.released
    comfy.model_management.unload_all_models()
    assert group.released == 1
    comfy.model_management.unload_all_models()
    assert group.released == 1
    memory.make_room(group)
    comfy.model_management.free_memory(1e15, comfy.model_management.get_torch_device())
    assert group.released == 2


def test_ranks_that_have_loaded_ahead_keep_it_until_everything_is_to_be_freed(memory):
    import comfy.model_management

    group = ReleasedGroup("cpu", decoded=False)
    memory.enter(group)
    memory.enter(group)
    comfy.model_management.free_memory(1e15, comfy.model_management.get_torch_device())
    assert not group.released
    comfy.model_management.unload_all_models()
    assert group.released == 1


def test_groups_make_room_for_each_other_where_they_share_a_device_alone(memory, monkeypatch):
    import comfy.model_management

    freed = []
    monkeypatch.setattr(
        comfy.model_management, "free_memory", lambda size, device, keep=(): freed.append(str(device)) or []
    )
    here, there, both = ReleasedGroup("cuda:1"), ReleasedGroup("cuda:2"), ReleasedGroup("cuda:1", "cuda:3")
    for group in (here, there, both):
        memory.make_room(group)
    assert (here.released, there.released, both.released) == (1, 0, 0)
    assert [device for device in freed if device != "cpu"] == ["cuda:1", "cuda:2", "cuda:1", "cuda:3"]
    monkeypatch.undo()
    comfy.model_management.free_memory(1e15, comfy.model_management.get_torch_device())
    assert (here.released, there.released, both.released) == (1, 0, 0), "they have nothing on the main device"


def test_a_group_whose_options_change_stays_the_one_on_its_devices(pack, monkeypatch):
    groups = importlib.import_module("hv15_pack.nodes.groups")
    monkeypatch.setattr(groups, "_groups", {})
    group = groups.live_group(groups.GroupDescription(devices="cpu,cpu"))
    changed = groups.GroupDescription(devices="CPU, cpu", dtype="float16", keep_loaded="stop", stall_timeout=7)
    assert groups.live_group(changed) is group and groups.all_groups() == [group]
    assert (group.dtype, group.keep_loaded, group.stall_timeout) == ("float16", "stop", 7)
    assert groups.live_group(groups.GroupDescription(devices="cpu")) is not group
    with pytest.raises(ValueError, match="backend is 'nccl'"):
        groups.live_group(groups.GroupDescription(devices="cpu,cpu", backend="nccl"))


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (torch.zeros(1, 32, 4, 4), "image model"),
        (torch.zeros(32), "1 dimensions"),
        (torch.zeros(1, 16, 1, 2, 2), "16 channels"),
        (torch.full((1, 32, 1, 2, 2), float("inf")), "128 of the latent's 128 values are not finite"),
        (torch.zeros(1, 32, 1, 2, 2, dtype=torch.int64), "int64"),
        (torch.zeros(1, 32, 0, 2, 2), "no empty dimension"),
        ([1, 2], "list"),
    ],
)
def test_a_bad_latent_is_refused_before_a_group_is_even_made(pack, core, samples, words):
    decoding, groups = (importlib.import_module(f"hv15_pack.nodes.{name}") for name in ("decoding", "groups"))
    with pytest.raises(ValueError, match=words):
        decoding.decode_on_ranks(samples, pack.load_vae(core.path), None, "seamless", 256, 64, 0)
    assert groups.all_groups() == []


def test_real_ranks_map_what_was_handed_over_and_another_vae_restarts_nothing(pack, core):
    from distributed import RankGroup

    vaes = [loaded_by_core(core.model), loaded_by_core(copy.deepcopy(core.model))]
    for parameter in vaes[1].first_stage_model.parameters():
        parameter.data *= 1.1
    with RankGroup(devices=["cpu", "cpu"]) as group:
        pids = [rank["pid"] for rank in group.status()["ranks"]]
        for vae in (*vaes, vaes[0]):
            source = pack.rank_source(vae)
            assert torch.allclose(group.decode(latent(3), source), ranks_decode(source, latent(3)), atol=1e-5)
        first = vaes.pop(0)
        source = pack.rank_source(first)
        del vae, first, core.model
        gc.collect()
        assert not source.exists(), "the weights of a VAE that is gone are still held"
        assert torch.isfinite(group.decode(latent(3), pack.rank_source(vaes[0]))).all()
        assert [rank["pid"] for rank in group.status()["ranks"]] == pids
