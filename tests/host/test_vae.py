"""The VAE object between core and the ranks: core's own classes at reduced width, against diffusers and our decoder."""

import copy
import gc
import importlib
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from core_models import WIDTHS, core_model, engine, weights_of


def loaded_by_core(model):
    """Return a VAE as core's VAELoader creates it, without a record of its file."""
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
    """Decode in this process, as a single rank does."""
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


def test_one_frame_equals_cores_decode(core):
    with torch.inference_mode():
        expected = to_frames(core.model.decode(latent(1)))
    assert (ranks_decode(core.path, latent(1)) - expected).abs().max() <= 1e-5


def test_several_frames_differ_from_cores_decode_by_the_causal_mask_only(core):
    """In core a frame attends to later frames. With the mask, core computes what the ranks compute."""
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


def test_either_layout_becomes_the_vae_that_core_would_create(pack, core, tmp_path):
    from distributed.vae.hunyuanvideo15.layout import to_diffusers

    renamed = tmp_path / "diffusers.safetensors"
    save_file({to_diffusers(key): tensor for key, tensor in weights_of(core.model).items()}, renamed)
    image = torch.rand(5, 48, 64, 3)
    with torch.inference_mode():
        # Core's encoder samples from the latent's distribution.
        torch.manual_seed(5)
        expected = core.model.encode(image.movedim(-1, 0).unsqueeze(0) * 2 - 1)
        for path in (core.path, renamed):
            vae = pack.load_vae(path, "float32")
            weights = vae.get_sd()
            assert weights.keys() == core.model.state_dict().keys()
            assert all(torch.equal(weights[key], tensor) for key, tensor in weights_of(core.model).items())
            assert all(tensor.isfinite().all() for tensor in weights.values())
            torch.manual_seed(5)
            assert torch.allclose(vae.encode(image), expected, atol=1e-5)
            assert vae.spacial_compression_decode() == 16 and vae.temporal_compression_decode() == 4
            frames = vae.decode(latent(1))
            assert torch.allclose(frames, to_frames(core.model.decode(latent(1))), atol=1e-5)


@pytest.fixture
def theirs(core, monkeypatch):
    """The VAE that core's own class creates from the checkpoint."""
    import comfy.sd

    with monkeypatch.context() as patch:
        patch.setattr(comfy.sd, "AutoencodingEngine", engine)
        return comfy.sd.VAE(sd=weights_of(core.model), dtype=torch.float32)


@pytest.mark.parametrize("frames", [1, 3])
@torch.inference_mode()  # as ComfyUI runs nodes
def test_core_decodes_with_our_vae_exactly_as_with_its_own(pack, core, theirs, frames):
    ours = pack.load_vae(core.path, "float32")
    expected = theirs.decode(latent(frames))
    assert expected.std() > 0.01 and expected.min() >= 0 and expected.max() <= 1
    assert torch.equal(ours.decode(latent(frames)), expected)
    tiles = {"tile_x": 2, "tile_y": 2, "overlap": 1}
    assert torch.equal(ours.decode_tiled(latent(frames), **tiles), theirs.decode_tiled(latent(frames), **tiles))


def test_core_encodes_with_our_vae_exactly_as_with_its_own(pack, core, theirs):
    """Core's encoder samples from the latent's distribution, so both are seeded."""
    ours = pack.load_vae(core.path, "float32")
    pixels = torch.rand(5, 50, 64, 3, generator=torch.Generator().manual_seed(2))  # core crops it to 48
    results = []
    for vae in (ours, theirs):
        torch.manual_seed(7)
        results.append(vae.encode(pixels))
    assert results[0].shape == (1, 32, 2, 3, 4) and torch.equal(*results)


def test_our_vae_has_every_attribute_of_cores_vae_with_the_same_value(pack, core, theirs):
    ours, shape = pack.load_vae(core.path, "float32"), (1, 32, 3, 30, 52)
    own = {"first_stage_model", "patcher"}
    for name, expected in vars(theirs).items():
        found = getattr(ours, name)
        if name in ("memory_used_decode", "memory_used_encode"):
            assert found(shape, torch.float16) == expected(shape, torch.float16), name
        elif name in ("process_input", "process_output"):
            values = torch.linspace(-2, 2, 9)
            assert torch.equal(found(values.clone()), expected(values.clone())), name
        elif name in ("upscale_ratio", "downscale_ratio"):
            assert (found[0](9), found[1:]) == (expected[0](9), expected[1:]), name
        elif name not in own:
            assert found == expected, name
    assert type(ours.patcher) is type(theirs.patcher)


def test_our_vae_keeps_the_attributes_that_cores_constructor_sets(pack, core, monkeypatch):
    """In later versions of core the output processor works in place."""
    import comfy.sd

    construct = comfy.sd.VAE.__init__

    def later(self, *args, **options):
        construct(self, *args, **options)
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.memory_used_decode = lambda shape, dtype: 3600

    monkeypatch.setattr(comfy.sd.VAE, "__init__", later)
    vae = pack.load_vae(core.path, "float32")
    pixels = torch.tensor([-3.0, 0.0, 1.0])
    vae.process_output(pixels)
    assert pixels.tolist() == [0.0, 0.5, 1.0] and vae.memory_used_decode((1,), torch.float32) == 3600


def add_unused(model):
    """Add tensors that core's model has in some versions, that no checkpoint has, and that no layer uses."""
    for part in (model.encoder, model.decoder):
        part.mid.block_1.temb_proj = torch.nn.Linear(512, WIDTHS[-1])


def test_cores_model_may_have_more_tensors_than_a_checkpoint(pack, core, monkeypatch):
    construct = pack.MappedModel.__init__

    def more(self, *args):
        construct(self, *args)
        add_unused(self)

    monkeypatch.setattr(pack.MappedModel, "__init__", more)
    vae = pack.load_vae(core.path, "float32")
    weights = vae.get_sd()
    assert not weights["decoder.mid.block_1.temb_proj.weight"].any()
    assert all(torch.equal(weights[key], tensor) for key, tensor in weights_of(core.model).items())
    assert torch.allclose(vae.decode(latent(1)), to_frames(core.model.decode(latent(1))), atol=1e-5)


def test_ranks_ignore_tensors_of_cores_model_that_no_checkpoint_has(pack, core):
    add_unused(core.model)
    core.model.decoder.mid.block_1.temb_proj.weight.data.fill_(float("nan"))
    assert torch.equal(
        ranks_decode(pack.rank_source(loaded_by_core(core.model)), latent(1)), ranks_decode(core.path, latent(1))
    )


def test_a_checkpoint_with_a_missing_tensor_is_refused(pack, core):
    weights = weights_of(core.model)
    for key in ("decoder.conv_out.conv.bias", "encoder.mid.attn_1.k.weight"):
        save_file({name: tensor for name, tensor in weights.items() if name != key}, core.path)
        with pytest.raises(ValueError, match="lacks"):
            pack.load_vae(core.path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_vae_is_loaded_in_the_requested_dtype(pack, core, tmp_path, dtype):
    path = tmp_path / "half.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in weights_of(core.model).items()}, path)
    for name, wanted in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        vae = pack.load_vae(path, name)
        assert {tensor.dtype for tensor in vae.get_sd().values()} == {wanted}


def test_ranks_map_the_file_on_disk(pack, core):
    vae = pack.load_vae(core.path)
    assert pack.rank_source(vae) == core.path
    assert pack.rank_source(copy.copy(vae)) == core.path


def load_vae_patcher(path, metadata, device):
    """A replacement for core's function of this name, which older versions do not have."""


def remembered(model, path):
    """Return a VAE as core's VAELoader creates it in versions that record its file."""
    vae = loaded_by_core(model)
    vae.patcher.cached_patcher_init = (load_vae_patcher, (str(path), None, None))
    return vae


def test_ranks_map_the_file_that_cores_loader_has_recorded(pack, core, tmp_path):
    assert pack.rank_source(remembered(core.model, core.path)) == core.path
    half = tmp_path / "half.safetensors"
    save_file({key: tensor.half() for key, tensor in weights_of(core.model).items()}, half)
    converted = copy.deepcopy(core.model).half().bfloat16()
    assert pack.rank_source(remembered(converted, half)) == half


def test_a_recorded_file_with_other_weights_than_the_vae_is_not_used(pack, core):
    changed = copy.deepcopy(core.model)
    changed.decoder.mid.attn_1.q.weight *= 1.1
    source = pack.rank_source(remembered(changed, core.path))
    assert source != core.path
    assert not torch.equal(ranks_decode(source, latent(3)), ranks_decode(core.path, latent(3)))
    assert pack.rank_source(remembered(core.model, core.path.with_name("gone.safetensors"))).is_file()


def test_core_can_load_our_vae_again_for_another_device(pack, core):
    import comfy.model_patcher

    vae = pack.load_vae(core.path, "float32")
    function, arguments = vae.patcher.cached_patcher_init
    again = function(*arguments)
    assert again.model is not vae.first_stage_model
    if hasattr(comfy.model_patcher.ModelPatcher, "deepclone_multigpu"):
        again = vae.patcher.deepclone_multigpu(new_load_device=torch.device("meta"))
        assert again.load_device == torch.device("meta")
    weights = again.model.state_dict()
    assert all(torch.equal(weights[key], tensor) for key, tensor in vae.get_sd().items())


def test_an_overwritten_file_is_refused_and_the_next_prompt_loads_it_again(pack, core, monkeypatch):
    """Its pages are mapped: reading them kills the process with SIGBUS if the file has become shorter."""
    monkeypatch.setattr(pack.module, "vae_path", lambda name: core.path)
    before = pack.LoadVAE.fingerprint_inputs("a file", "auto")
    vae = pack.load_vae(core.path)
    assert pack.LoadVAE.fingerprint_inputs("a file", "auto") == before
    with open(core.path, "r+b") as file:
        file.truncate(core.path.stat().st_size // 2)
    with pytest.raises(ValueError, match="was overwritten while it was loaded"):
        pack.rank_source(vae)
    save_file({key: tensor * 1.1 for key, tensor in weights_of(core.model).items()}, core.path)
    assert pack.LoadVAE.fingerprint_inputs("a file", "auto") != before


def test_ranks_get_the_loaded_weights_after_the_file_was_replaced_or_deleted(pack, core):
    vae = pack.load_vae(core.path)
    before = ranks_decode(core.path, latent(1))
    # os.replace gives the path a new file; the pages of the old file stay mapped.
    other = core.path.with_name("other.safetensors")
    save_file({key: tensor * 1.1 for key, tensor in weights_of(core.model).items()}, other)
    os.replace(other, core.path)
    source = pack.rank_source(vae)
    assert source != core.path and torch.equal(ranks_decode(source, latent(1)), before)
    core.path.unlink()
    assert pack.rank_source(vae) == source


def test_weights_in_memory_are_copied_once_even_if_core_moves_them(pack, core):
    vae = loaded_by_core(core.model)
    source = pack.rank_source(vae)
    assert torch.equal(ranks_decode(source, latent(3)), ranks_decode(core.path, latent(3)))
    for parameter in core.model.parameters():  # as when core moves them between devices
        parameter.data = parameter.data.clone()
    assert pack.rank_source(vae) == source == pack.rank_source(copy.copy(vae))


def test_changed_weights_are_copied_again(pack, core):
    vae = loaded_by_core(core.model)
    before = ranks_decode(pack.rank_source(vae), latent(1))
    for parameter in core.model.decoder.parameters():
        parameter.data *= 1.1
    assert not torch.equal(ranks_decode(pack.rank_source(vae), latent(1)), before)


def test_two_vaes_are_never_confused(pack, core):
    """Memory addresses would not identify a VAE: the second may be allocated where the first was."""
    vae = loaded_by_core(core.model)
    first = ranks_decode(pack.rank_source(vae), latent(1))
    other = loaded_by_core(copy.deepcopy(core.model))
    for parameter in other.first_stage_model.parameters():
        parameter.data *= 1.1
    assert not torch.equal(ranks_decode(pack.rank_source(other), latent(1)), first)
    assert torch.equal(ranks_decode(pack.rank_source(vae), latent(1)), first)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems use a file in a private folder")
def test_the_copy_has_no_name_on_disk_and_is_freed_with_its_vae(pack, tmp_path):
    vae = loaded_by_core(core_model(pack))
    source = pack.rank_source(vae)
    assert source.is_file() and "(deleted)" in os.readlink(source)
    assert source.stat().st_mode & 0o077 == 0
    del vae
    gc.collect()
    assert not source.exists()


def test_weights_that_cores_loader_did_not_read_are_refused(pack, core):
    """Core only warns about missing keys of a diffusers file and leaves these weights uninitialised."""
    core.model.decoder.mid.block_1.conv1.conv.weight.zero_()
    with pytest.raises(ValueError, match=r"not loaded completely.*Load HunyuanVideo-1\.5 VAE"):
        pack.rank_source(loaded_by_core(core.model))
    core.model.decoder.mid.block_1.conv1.conv.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        pack.rank_source(loaded_by_core(core.model))


def test_a_vae_of_another_model_is_refused_by_name(pack):
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    model = AutoencoderKL(block_out_channels=(32,), **blocks)
    vae = SimpleNamespace(first_stage_model=model, get_sd=model.state_dict)
    with pytest.raises(ValueError, match="Stable Diffusion"):
        pack.rank_source(vae)


def test_a_checkpoint_with_only_a_decoder_is_refused_by_the_loader(pack, core, tmp_path):
    weights = {key: tensor for key, tensor in weights_of(core.model).items() if key.startswith("decoder.")}
    save_file(weights, tmp_path / "decoder.safetensors")
    with pytest.raises(ValueError, match="it has no encoder"):
        pack.load_vae(tmp_path / "decoder.safetensors")


@pytest.fixture
def decodes(pack, monkeypatch):
    """The arguments with which a distributed VAE calls `decode_on_ranks`, which is replaced."""
    distribute = importlib.import_module("hv15_pack.nodes.distribute")
    calls = []
    monkeypatch.setattr(
        distribute,
        "decode_on_ranks",
        lambda latent, vae, options: calls.append((options.mode, options.tile_size, options.overlap, options.memory)),
    )

    def distributed(vae, *options):
        return distribute.distributed(vae, distribute.DecodeOptions(*options))

    return SimpleNamespace(calls=calls, distributed=distributed)


def test_a_distributed_vae_equals_the_vae_in_everything_but_decoding(pack, core, decodes):
    import comfy.model_management
    import comfy.sd

    vae = pack.load_vae(core.path, "float32")
    twin = decodes.distributed(vae, None, "seamless", 256, 64, 0)
    again = copy.copy(decodes.distributed(twin, None, "tiled", 128, 32, 6))
    assert isinstance(again, comfy.sd.VAE) and again.patcher is vae.patcher
    assert again.get_sd().keys() == vae.get_sd().keys() and pack.rank_source(again) == core.path
    assert type(copy.deepcopy(twin)) is type(twin) and copy.deepcopy(twin).options == twin.options
    twin.decode(latent(1))
    again.decode(latent(1), vae_options={})
    again.decode_tiled(latent(1))
    again.decode_tiled(latent(1), tile_x=8, tile_y=4, overlap=1, tile_t=16, overlap_t=2)
    assert decodes.calls == [
        ("seamless", 256, 64, 0),
        ("tiled", 128, 32, 6),
        ("tiled", 128, 32, 6),
        ("tiled", 64, 16, 6),
    ]
    loaded = [model.model for model in comfy.model_management.current_loaded_models]
    assert vae.patcher not in loaded, "core's model was loaded for a decode on ranks"


def test_a_decode_attribute_of_the_vae_does_not_bypass_the_ranks(pack, core, decodes):
    vae = pack.load_vae(core.path, "float32")
    vae.decode = vae.decode_tiled = lambda *_: "not on ranks"
    twin = decodes.distributed(vae, None, "seamless", 256, 64, 0)
    assert twin.decode(latent(1)) is None and twin.decode_tiled(latent(1)) is None
    assert len(decodes.calls) == 2 and vae.decode() == "not on ranks"


def test_a_distributed_vae_keeps_the_methods_of_another_packs_vae_class(pack, core, decodes):
    vae = pack.load_vae(core.path, "float32")
    odd = type("OddVAE", (type(vae),), {"encode": lambda self, pixels: "encoded oddly", "decode": lambda *_: "not so"})
    vae.__class__ = odd
    twin = decodes.distributed(vae, None, "seamless", 256, 64, 0)
    assert isinstance(twin, odd) and twin.encode(None) == "encoded oddly"
    twin.decode(latent(1))
    assert decodes.calls == [("seamless", 256, 64, 0)]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(1, 32, 4, 4), r"\[1, 32, 4, 4\]; a video latent is"),
        (torch.zeros(32), r"\[32\]; a video latent is"),
        (torch.zeros(1, 16, 1, 2, 2), "16 channels"),
        (torch.full((1, 32, 1, 2, 2), float("inf")), "128 of 128 latent values are NaN or infinite"),
        (torch.zeros(1, 32, 1, 2, 2, dtype=torch.int64), "int64"),
        (torch.zeros(1, 32, 0, 2, 2), "no empty dimension"),
        ([1, 2], "list"),
    ],
)
def test_a_bad_latent_is_refused_before_a_group_is_created(pack, core, samples, message):
    on_ranks, groups = (importlib.import_module(f"hv15_pack.nodes.{name}") for name in ("on_ranks", "groups"))
    options, before = on_ranks.DecodeOptions(None, "seamless", 256, 64), groups.all_groups()
    states = [group.status()["state"] for group in before]
    with pytest.raises(ValueError, match=message):
        on_ranks.decode_on_ranks(samples, pack.load_vae(core.path), options)
    assert groups.all_groups() == before
    assert [group.status()["state"] for group in before] == states


def test_real_ranks_map_copied_weights_and_another_vae_restarts_no_process(pack, core):
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
        assert not source.exists(), "the weights of a deleted VAE are still allocated"
        assert torch.isfinite(group.decode(latent(3), pack.rank_source(vaes[0]))).all()
        assert [rank["pid"] for rank in group.status()["ranks"]] == pids
