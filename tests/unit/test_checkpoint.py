"""Checkpoints on disk: every kind of file and folder is found and read, and damaged ones are refused."""

import json
import pickle

import pytest
import torch

from distributed.errors import CheckpointError
from distributed.quoting import LIMIT, printable
from distributed.vae.checkpoint import all_tensors, decoder_tensors, open_checkpoint
from distributed.vae.handover import check_state_dict
from tests.unit.checkpoints import (
    HOSTILE,
    WIDTHS,
    assert_harmless,
    assert_same,
    decoder_of,
    save,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_single_file_of_either_layout_gives_the_same_tensors(weights, core, tmp_path, dtype):
    weights = {key: tensor.to(dtype) for key, tensor in weights.items()}
    core = {key: tensor.to(dtype) for key, tensor in core.items()}
    for layout, tensors in (("diffusers", weights), ("core", core)):
        checkpoint = open_checkpoint(save(tensors, tmp_path / f"{layout}.safetensors"))
        assert (checkpoint.layout, checkpoint.dtype, checkpoint.has_encoder) == (layout, dtype, True)
        assert (checkpoint.block_out_channels, checkpoint.layers_per_block) == (WIDTHS, 2)
        assert checkpoint.latent_channels == 32
        assert_same(decoder_tensors(checkpoint), decoder_of(weights))
        assert_same(all_tensors(checkpoint), weights)


def test_a_vae_folder_a_pipeline_folder_and_a_variant_are_found(model, weights, tmp_path):
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae", tmp_path / "variant"):
        assert_same(decoder_tensors(open_checkpoint(folder)), decoder_of(weights))


def test_a_sharded_checkpoint_is_read_from_its_folder_or_its_index(model, weights, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    for path in (tmp_path, index):
        assert_same(all_tensors(open_checkpoint(path)), weights)
    next(tmp_path.glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="do not exist: 'diffusion_pytorch_model-00002"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_invalid_index_is_refused(tmp_path, text):
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path)


def test_an_index_cannot_name_files_outside_its_folder(weights, tmp_path):
    save(weights, tmp_path / "secret.safetensors")
    (tmp_path / "inner").mkdir()
    index = tmp_path / "inner" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="do not exist"):
        open_checkpoint(index)


def test_another_model_with_the_same_keys_is_recognised_by_its_class_name(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKLHunyuanImageRefiner"}))
    with pytest.raises(CheckpointError, match="AutoencoderKLHunyuanImageRefiner"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_weights_of_unsupported_float_dtypes_are_refused(weights, tmp_path, dtype):
    key = "decoder.conv_in.conv.weight"
    weights[key] = weights[key].to(dtype)
    for use in (check_state_dict, lambda state: open_checkpoint(save(state, tmp_path / "a.safetensors"))):
        with pytest.raises(CheckpointError, match=f"'{key}' as .*bfloat16 and float16 can be used"):
            use(weights)


def test_names_from_checkpoints_are_quoted_and_truncated_in_messages(weights, tmp_path):
    for state in (
        {HOSTILE: torch.zeros(1)},
        {**weights, f"decoder.up_blocks.0.resnets.7.{HOSTILE}": torch.zeros(1)},
        {**weights, f"decoder.up_blocks.{HOSTILE}.x": torch.zeros(1), "decoder.up_blocks.5.x": torch.zeros(1)},
    ):
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(save(state, tmp_path / "a.safetensors"))
        assert_harmless(error.value)
        with pytest.raises(CheckpointError) as error:
            check_state_dict(state)
        assert_harmless(error.value)
    assert "\\x1b" in printable(HOSTILE) and len(printable(HOSTILE)) < 8 * LIMIT


def test_malicious_configs_and_indices_are_refused_with_a_harmless_message(model, tmp_path):
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
        assert_harmless(error.value)
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
        assert_harmless(error.value)


def test_a_checkpoint_with_far_too_many_blocks_is_refused(weights, tmp_path):
    more = {f"decoder.up_blocks.0.resnets.{i}.x": torch.empty(0) for i in range(3, 100_000)}
    with pytest.raises(CheckpointError, match="100000 residual blocks"):
        open_checkpoint(save({**weights, **more}, tmp_path / "a.safetensors"))


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


def test_identity_changes_with_the_file(weights, tmp_path):
    path = save(weights, tmp_path / "a.safetensors")
    before = open_checkpoint(path).identity
    assert open_checkpoint(path).identity == before
    save({key: tensor + 1 for key, tensor in weights.items()}, path)
    assert open_checkpoint(path).identity != before
