"""The layout of the VAE: its tensors are recognised by name and shape, and other models are refused."""

import pytest
import torch
from safetensors.torch import load_file

from distributed.errors import CheckpointError
from distributed.vae.checkpoint import all_tensors, open_checkpoint
from distributed.vae.handover import SharedWeights, check_state_dict, fingerprint
from distributed.vae.hunyuanvideo15.layout import to_core, to_diffusers
from tests.unit.checkpoints import assert_same, decoder_of, save


def test_renaming_is_one_to_one_and_reversible(weights):
    assert len({to_core(key) for key in weights}) == len(weights) == 218
    assert all(to_diffusers(to_core(key)) == key for key in weights)


@pytest.mark.parametrize("key", ["decoder.conv_out.conv.bias", "encoder.mid_block.attentions.0.to_k.weight"])
@pytest.mark.parametrize("layout", ["diffusers", "core"])
def test_missing_tensors_and_wrong_shapes_are_named(weights, core, tmp_path, key, layout):
    tensors = weights if layout == "diffusers" else core
    name = key if layout == "diffusers" else to_core(key)
    whole = tensors.pop(name)
    with pytest.raises(CheckpointError, match=f"lacks '{key}'"):
        open_checkpoint(save(tensors, tmp_path / "a.safetensors"), encoder=True)
    tensors[name] = torch.zeros(whole.shape[0] + 1, *whole.shape[1:])
    with pytest.raises(CheckpointError, match=f"'{key}' of shape"):
        open_checkpoint(save(tensors, tmp_path / "a.safetensors"), encoder=True)


def unread(width):
    """Return tensors that the VAE of ComfyUI 0.33 has in addition to a checkpoint's, and that no code reads."""
    names = [f"{half}.mid.block_{i}.temb_proj" for half in ("encoder", "decoder") for i in (1, 2)]
    return {f"{name}.weight": torch.full((width, 0), torch.nan) for name in names} | {
        f"{name}.bias": torch.full((width,), torch.nan) for name in names
    }


@pytest.mark.parametrize(
    "extra", [unread(64), {"decoder.extra.weight": torch.zeros(1, dtype=torch.int8)}, {"x": torch.zeros(1)}]
)
def test_unneeded_tensors_are_ignored(weights, core, tmp_path, extra):
    for state in (weights, core):
        checkpoint = open_checkpoint(save({**state, **extra}, tmp_path / "a.safetensors"), encoder=True)
        assert_same(all_tensors(checkpoint), weights)
        assert check_state_dict({**state, **extra}) == checkpoint.layout
        assert fingerprint({**state, **extra}) == fingerprint(weights)
        shared = SharedWeights({**state, **extra}, "mark")
        assert_same(load_file(shared.path), decoder_of(weights, prefix=""))


def test_a_damaged_encoder_does_not_affect_the_decoder(weights, tmp_path):
    del weights["encoder.conv_in.conv.bias"]
    weights["encoder.conv_out.conv.bias"] = torch.full((64,), torch.nan)
    checkpoint = open_checkpoint(save(weights, tmp_path / "a.safetensors"))
    assert not checkpoint.has_encoder
    assert_same(all_tensors(checkpoint), decoder_of(weights, prefix=""))
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
def test_a_model_with_more_or_other_blocks_is_refused(weights, tmp_path, key):
    with pytest.raises(CheckpointError, match=r"more blocks \('decoder\.|Stable Video Diffusion"):
        open_checkpoint(save({**weights, key: torch.zeros(1)}, tmp_path / "a.safetensors"))


def test_an_encoder_with_more_blocks_is_refused_if_it_is_needed(weights, tmp_path):
    more = {"encoder.down_blocks.5.resnets.0.norm1.gamma": torch.zeros(1)}
    path = save({**weights, **more}, tmp_path / "a.safetensors")
    assert_same(all_tensors(open_checkpoint(path)), weights)
    with pytest.raises(CheckpointError, match="more blocks"):
        open_checkpoint(path, encoder=True)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
@pytest.mark.parametrize(
    ("start", "place"),
    [("", "{}."), ("decoder", "decoder.{}"), ("encoder", "encoder.{}"), ("decoder.conv_in", "decoder.conv_in.{}")],
)
def test_key_parts_added_by_wrappers_are_removed(weights, core, tmp_path, wrapper, start, place):
    place = place.format(wrapper)
    for state in (weights, core):
        wrapped = {place + key.removeprefix(start) if key.startswith(start) else key: t for key, t in state.items()}
        assert wrapped.keys() != state.keys()
        checkpoint = open_checkpoint(save(wrapped, tmp_path / "a.safetensors"), encoder=True)
        assert_same(all_tensors(checkpoint), weights)
        assert check_state_dict(wrapped) == checkpoint.layout
        assert fingerprint(wrapped) == fingerprint(state)


def test_a_duplicate_tensor_is_refused(weights, tmp_path):
    twice = {**weights, "decoder._orig_mod.conv_in.conv.bias": weights["decoder.conv_in.conv.bias"] + 1}
    with pytest.raises(
        CheckpointError, match=r"twice, as 'decoder\._orig_mod\.conv_in\.conv\.bias' and as 'decoder\.conv_in"
    ):
        open_checkpoint(save(twice, tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match="twice"):
        check_state_dict(twice)


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
        (lambda: {}, "holds no tensors"),
    ],
)
def test_other_models_are_refused_by_name(tensors, name, tmp_path):
    # Tensors have one element to keep files small: only keys and the first convolution's shape are read.
    state = {
        key: torch.zeros(tensor.shape) if key.startswith("decoder.conv_in") else torch.zeros(1)
        for key, tensor in tensors().items()
    }
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(save(state, tmp_path / "other.safetensors"))
