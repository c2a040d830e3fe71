"""Checkpoints: every layout is recognised and read right, and nothing else is taken."""

import json
import pickle
import stat

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from safetensors.torch import load_file, save_file

from distributed.errors import CheckpointError
from distributed.quoting import LIMIT, printable
from distributed.vae.checkpoint import (
    all_tensors,
    check_state_dict,
    decoder_tensors,
    fingerprint,
    open_checkpoint,
    share_state_dict,
    to_core,
    to_diffusers,
)

WIDTHS = (8, 16, 32, 64, 64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoencoderKLHunyuanVideo15(block_out_channels=WIDTHS)


@pytest.fixture
def weights(model):
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


@pytest.fixture
def core(weights):
    return {to_core(key): tensor for key, tensor in weights.items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[key], expected[key]) for key in expected)


def decoder_of(weights, prefix="decoder."):
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith("decoder.")}


def save(tensors, path):
    save_file(tensors, path)
    return path


def test_renaming_is_one_to_one_and_its_own_inverse(weights):
    assert len({to_core(key) for key in weights}) == len(weights) == 218
    assert all(to_diffusers(to_core(key)) == key for key in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_single_file_of_either_layout_gives_the_same_tensors(weights, core, tmp_path, dtype):
    weights = {key: tensor.to(dtype) for key, tensor in weights.items()}
    core = {key: tensor.to(dtype) for key, tensor in core.items()}
    for layout, tensors in (("diffusers", weights), ("core", core)):
        checkpoint = open_checkpoint(save(tensors, tmp_path / f"{layout}.safetensors"))
        assert (checkpoint.layout, checkpoint.dtype, checkpoint.has_encoder) == (layout, dtype, True)
        assert (checkpoint.block_out_channels, checkpoint.layers_per_block) == (WIDTHS, 2)
        assert checkpoint.latent_channels == 32
        assert same(decoder_tensors(checkpoint), decoder_of(weights))
        assert same(all_tensors(checkpoint), weights)


def test_a_vae_folder_a_pipeline_folder_and_a_variant_are_found(model, weights, tmp_path):
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae", tmp_path / "variant"):
        assert same(decoder_tensors(open_checkpoint(folder)), decoder_of(weights))


def test_a_checkpoint_in_parts_is_read_whole_from_its_folder_or_its_index(model, weights, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    for path in (tmp_path, index):
        assert same(all_tensors(open_checkpoint(path)), weights)
    next(tmp_path.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="not there: 'diffusion_pytorch_model-00002"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(weights, tmp_path):
    save(weights, tmp_path / "secret.safetensors")
    (tmp_path / "inner").mkdir()
    index = tmp_path / "inner" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="not there"):
        open_checkpoint(index)


def test_a_folder_of_a_model_with_the_same_keys_is_told_by_its_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKLHunyuanImageRefiner"}))
    with pytest.raises(CheckpointError, match="AutoencoderKLHunyuanImageRefiner"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("key", ["decoder.conv_out.conv.bias", "encoder.mid_block.attentions.0.to_k.weight"])
@pytest.mark.parametrize("layout", ["diffusers", "core"])
def test_missing_and_misshapen_keys_are_named(weights, core, tmp_path, key, layout):
    tensors = weights if layout == "diffusers" else core
    name = key if layout == "diffusers" else to_core(key)
    whole = tensors.pop(name)
    with pytest.raises(CheckpointError, match=f"lacks '{key}'"):
        open_checkpoint(save(tensors, tmp_path / "a.safetensors"), encoder=True)
    tensors[name] = torch.zeros(whole.shape[0] + 1, *whole.shape[1:])
    with pytest.raises(CheckpointError, match=f"'{key}' of shape"):
        open_checkpoint(save(tensors, tmp_path / "a.safetensors"), encoder=True)


def unread(width):
    """Tensors that core 0.33's model of the VAE has beside a checkpoint's, and that nothing reads."""
    names = [f"{half}.mid.block_{i}.temb_proj" for half in ("encoder", "decoder") for i in (1, 2)]
    return {f"{name}.weight": torch.full((width, 0), torch.nan) for name in names} | {
        f"{name}.bias": torch.full((width,), torch.nan) for name in names
    }


@pytest.mark.parametrize(
    "extra", [unread(64), {"decoder.extra.weight": torch.zeros(1, dtype=torch.int8)}, {"x": torch.zeros(1)}]
)
def test_tensors_that_are_not_needed_do_not_matter(weights, core, tmp_path, extra):
    for state in (weights, core):
        checkpoint = open_checkpoint(save({**state, **extra}, tmp_path / "a.safetensors"), encoder=True)
        assert same(all_tensors(checkpoint), weights)
        assert check_state_dict({**state, **extra}) == checkpoint.layout
        assert fingerprint({**state, **extra}) == fingerprint(weights)
        assert same(load_file(share_state_dict({**state, **extra}, tmp_path)), decoder_of(weights, prefix=""))


def test_what_is_wrong_with_an_encoder_does_not_keep_a_decoder_from_its_work(weights, tmp_path):
    del weights["encoder.conv_in.conv.bias"]
    weights["encoder.conv_out.conv.bias"] = torch.full((64,), torch.nan)
    checkpoint = open_checkpoint(save(weights, tmp_path / "a.safetensors"))
    assert not checkpoint.has_encoder
    assert same(all_tensors(checkpoint), decoder_of(weights, prefix=""))
    assert check_state_dict(weights) == "diffusers" and fingerprint(weights)


@pytest.mark.parametrize(
    "key",
    [
        "decoder.up_blocks.3.resnets.3.conv1.conv.weight",
        "decoder.up_blocks.4.upsamplers.0.conv.conv.weight",
        "decoder.mid_block.resnets.2.norm1.gamma",
        "decoder.mid_block.attentions.1.to_q.weight",
        "decoder.up.3.block.3.norm1.gamma",
        "decoder.mid.block_1.mix_factor",
    ],
)
def test_a_model_with_more_blocks_or_other_ones_is_refused(weights, tmp_path, key):
    with pytest.raises(CheckpointError, match=r"more blocks \('decoder\.|Stable Video Diffusion"):
        open_checkpoint(save({**weights, key: torch.zeros(1)}, tmp_path / "a.safetensors"))


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
@pytest.mark.parametrize(
    ("start", "place"),
    [("", "{}."), ("decoder", "decoder.{}"), ("encoder", "encoder.{}"), ("decoder.conv_in", "decoder.conv_in.{}")],
)
def test_names_that_wrappers_add_are_left_out(weights, core, tmp_path, wrapper, start, place):
    place = place.format(wrapper)
    for state in (weights, core):
        wrapped = {place + key.removeprefix(start) if key.startswith(start) else key: t for key, t in state.items()}
        assert wrapped.keys() != state.keys()
        checkpoint = open_checkpoint(save(wrapped, tmp_path / "a.safetensors"), encoder=True)
        assert same(all_tensors(checkpoint), weights)
        assert check_state_dict(wrapped) == checkpoint.layout
        assert fingerprint(wrapped) == fingerprint(state)


def test_a_tensor_that_is_there_twice_is_refused(weights, tmp_path):
    twice = {**weights, "decoder._orig_mod.conv_in.conv.bias": weights["decoder.conv_in.conv.bias"] + 1}
    with pytest.raises(
        CheckpointError, match=r"twice, as 'decoder\._orig_mod\.conv_in\.conv\.bias' and as 'decoder\.conv_in"
    ):
        open_checkpoint(save(twice, tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match="twice"):
        check_state_dict(twice)


def test_a_fingerprint_changes_with_the_decoder_alone_and_refuses_what_was_not_loaded(weights):
    before = fingerprint(weights)
    weights["encoder.conv_in.conv.bias"] = weights["encoder.conv_in.conv.bias"] + 1
    assert fingerprint(weights) == before
    key = "decoder.conv_in.conv.bias"
    assert fingerprint({**weights, key: weights[key] + 1}) != before
    for value, text in (
        (weights[key] * torch.nan, "not finite"),
        (torch.empty_like(weights[key], device="meta"), "meta"),
    ):
        with pytest.raises(CheckpointError, match=text):
            fingerprint({**weights, key: value})
    with pytest.raises(CheckpointError, match=r"'decoder\.norm_out\.gamma' is all zeros"):
        fingerprint({**weights, "decoder.norm_out.gamma": torch.zeros_like(weights["decoder.norm_out.gamma"])})


@pytest.mark.gpu
def test_a_fingerprint_is_the_same_wherever_the_tensors_are(weights):
    before = fingerprint(weights)
    moved = {key: tensor.cuda() if i % 2 else tensor for i, (key, tensor) in enumerate(weights.items())}
    assert fingerprint(moved) == before


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_weights_of_other_floats_are_refused(weights, tmp_path, dtype):
    key = "decoder.conv_in.conv.weight"
    weights[key] = weights[key].to(dtype)
    for use in (fingerprint, check_state_dict, lambda state: open_checkpoint(save(state, tmp_path / "a.safetensors"))):
        with pytest.raises(CheckpointError, match=f"'{key}' as .*bfloat16 and float16 can be used"):
            use(weights)


HOSTILE = "\x1b]0;owned\x07\n\r\u202e" + "x" * 3_000_000
"""Escapes for the terminal, lines, text from right to left, and 3 MB."""


def told(error):
    """A message, once it is known to be one short, harmless line."""
    text = str(error.value)
    assert text.isprintable() and len(text) < 1000
    return text


def test_names_out_of_checkpoints_are_shown_quoted_and_cut(weights, tmp_path):
    for state in (
        {HOSTILE: torch.zeros(1)},
        {**weights, f"decoder.up_blocks.0.resnets.7.{HOSTILE}": torch.zeros(1)},
        {**weights, f"decoder.up_blocks.{HOSTILE}.x": torch.zeros(1), "decoder.up_blocks.5.x": torch.zeros(1)},
    ):
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(save(state, tmp_path / "a.safetensors"))
        told(error)
        with pytest.raises(CheckpointError) as error:
            check_state_dict(state)
        told(error)
    assert "\\x1b" in printable(HOSTILE) and len(printable(HOSTILE)) < 8 * LIMIT


def test_configs_and_indices_that_are_made_to_harm_are_refused_in_words(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    config, index = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    hostile = json.dumps(HOSTILE[:100_000])
    for text in (
        "[" * 1_000_000,
        '{"_class_name": ' + "[" * 900 + "]" * 900 + "}",
        f'{{"_class_name": {hostile}}}',
        '{"_class_name": ["a"]}',
        " " * (17 * 2**20),
        "\x1b[2J",
    ):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json|_class_name|holds a") as error:
            open_checkpoint(tmp_path)
        told(error)
    config.unlink()
    for text in (
        "[" * 1_000_000,
        '{"weight_map": [["a", "b"]]}',
        f'{{"weight_map": {{"a": {hostile}}}}}',
        '{"weight_map": {"a": "\\u0000.safetensors"}}',
        '{"weight_map": {"a": ""}}',
        json.dumps({"weight_map": {"a": "x" * 5000 + ".safetensors"}}),
        json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(100_000)}}),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json") as error:
            open_checkpoint(tmp_path)
        told(error)


def test_a_checkpoint_of_a_million_blocks_is_refused_at_once(weights, tmp_path):
    more = {f"decoder.up_blocks.0.resnets.{i}.x": torch.empty(0) for i in range(3, 100_000)}
    with pytest.raises(CheckpointError, match="100000 residual blocks"):
        open_checkpoint(save({**weights, **more}, tmp_path / "a.safetensors"))


@pytest.mark.parametrize("state", [{1: torch.zeros(1)}, {"decoder.conv_in.conv.weight": [1.0]}, {("a", "b"): None}])
def test_what_is_no_state_dict_is_refused(state):
    for use in (check_state_dict, fingerprint):
        with pytest.raises(CheckpointError, match="not a state dict"):
            use(state)


def test_weights_that_are_no_floats_are_refused(weights, tmp_path):
    weights["decoder.conv_out.conv.bias"] = torch.zeros(3, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="I8"):
        open_checkpoint(save(weights, tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match="int8"):
        share_state_dict(weights, tmp_path)


def test_other_formats_and_damaged_files_are_refused(weights, tmp_path):
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(pickle.dumps({"decoder.conv_in.conv.weight": [1]}))
    (tmp_path / "vae.pt").write_bytes(renamed.read_bytes())
    whole = save(weights, tmp_path / "whole.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"not a \.safetensors"):
        open_checkpoint(tmp_path / "vae.pt")
    for damage in (renamed.read_bytes(), b"", whole[:4], whole[:1000], whole[:-1], b"\xff" * 64):
        renamed.write_bytes(damage)
        with pytest.raises(CheckpointError, match="cannot be read"):
            open_checkpoint(renamed)
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="has no"):
        open_checkpoint(tmp_path / "..")


def _diffusers(name, **options):
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, name)(**options).state_dict()


IMAGE = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        (lambda: _diffusers("AutoencoderKLWan"), "a Wan or Qwen"),
        (lambda: _diffusers("AutoencoderKLHunyuanVideo"), "HunyuanVideo 1.0"),
        (lambda: _diffusers("AutoencoderKLCosmos"), "Cosmos"),
        (lambda: _diffusers("AutoencoderKLMochi"), "Mochi"),
        (lambda: _diffusers("AutoencoderKLCogVideoX"), "CogVideoX"),
        (lambda: _diffusers("AutoencoderKL", **IMAGE), "Stable Diffusion VAE"),
        (lambda: _diffusers("AutoencoderKL", latent_channels=16, **IMAGE), "Flux"),
        (lambda: {"decoder.middle.0.residual.0.gamma": torch.zeros(1)}, "Wan 2.1"),
        (
            lambda: {
                "decoder.middle.0.residual.0.gamma": torch.zeros(1),
                "decoder.upsamples.0.upsamples.0.residual.2.weight": torch.zeros(1),
            },
            "Wan 2.2",
        ),
        (
            lambda: {
                "decoder.conv_in.conv.weight": torch.zeros(8, 16, 3, 3, 3),
                "decoder.up.0.block.0.norm1.weight": torch.zeros(1),
            },
            "HunyuanVideo 1.0",
        ),
        (lambda: {"decoder.conv_in.weight": torch.zeros(8, 64, 3, 3)}, "HunyuanImage 2.1"),
        (lambda: {"decoder.conv_in.weight": torch.zeros(8, 32, 3, 3, 3)}, "HunyuanImage 3.0"),
        (lambda: {"decoder.22.bias": torch.zeros(12)}, "TAEHV"),
        (lambda: {}, "holds nothing"),
    ],
)
def test_other_models_are_refused_by_name(tensors, name, tmp_path):
    # One element each: only keys and the first convolution's shape are looked at, and files stay small.
    state = {
        key: torch.zeros(tensor.shape) if key.startswith("decoder.conv_in") else torch.zeros(1)
        for key, tensor in tensors().items()
    }
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(save(state, tmp_path / "other.safetensors"))


def test_weights_in_memory_are_handed_over_as_a_private_file_of_the_decoder_alone(weights, core, tmp_path):
    for state in (weights, core):
        path = share_state_dict(state, tmp_path, "shared")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        checkpoint = open_checkpoint(path)
        assert not checkpoint.has_encoder and all(key.startswith("decoder.") for key in load_file(path))
        assert same(decoder_tensors(checkpoint), decoder_of(weights))


def test_nothing_is_written_of_weights_that_are_refused(weights, tmp_path):
    del weights["decoder.norm_out.gamma"]
    with pytest.raises(CheckpointError, match=r"The VAE .* lacks 'decoder.norm_out.gamma'"):
        share_state_dict(weights, tmp_path)
    assert not list(tmp_path.iterdir())


def test_identity_changes_with_the_file(weights, tmp_path):
    path = save(weights, tmp_path / "a.safetensors")
    before = open_checkpoint(path).identity
    assert open_checkpoint(path).identity == before
    save({key: tensor + 1 for key, tensor in weights.items()}, path)
    assert open_checkpoint(path).identity != before
