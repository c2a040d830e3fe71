"""Weights in memory: their transfer to the ranks, and the fingerprint that detects changes."""

import stat
import tempfile

import pytest
import torch
from safetensors.torch import load_file

from distributed.errors import CheckpointError
from distributed.ranks import shared_memory
from distributed.ranks.shared_memory import local_path, place_of
from distributed.vae.checkpoint import decoder_tensors, open_checkpoint
from distributed.vae.handover import SharedWeights, check_state_dict, fingerprint
from tests.unit.checkpoints import assert_same, decoder_of, save


def test_weights_in_memory_are_shared_as_a_private_file_of_only_the_decoder(weights, core):
    half = {key: tensor.bfloat16() if "norm" in key else tensor for key, tensor in weights.items()}
    for state in (weights, core, half):
        shared = SharedWeights(state, "mark")
        assert stat.S_IMODE(shared.path.stat().st_mode) == 0o600
        checkpoint = open_checkpoint(shared.path)
        assert not checkpoint.has_encoder and all(key.startswith("decoder.") for key in load_file(shared.path))
        assert_same(decoder_tensors(checkpoint), decoder_of(half if state is half else weights))


def test_a_rank_opens_shared_weights_without_a_folder_and_read_only(weights, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    shared, second = SharedWeights(weights, "one"), SharedWeights(weights, "two")
    place = place_of(shared.path)
    path = local_path(place)
    assert path != shared.path and local_path(place) == path
    assert_same(decoder_tensors(open_checkpoint(path)), decoder_of(weights))
    with pytest.raises(PermissionError), open(path, "r+b") as file:
        file.write(b"other")
    assert local_path(place_of(second.path)) != path and not path.exists()
    assert place_of(tmp_path) == str(tmp_path) and local_path(str(tmp_path)) == tmp_path


def test_freed_weights_cannot_be_opened_but_mappings_survive(weights):
    shared = SharedWeights(weights, "mark")
    place, tensors = place_of(shared.path), load_file(shared.path)
    del shared
    with pytest.raises(OSError):
        local_path(place)
    assert_same(tensors, decoder_of(weights, prefix=""))  # existing mappings stay valid


def test_weights_that_do_not_fit_into_memory_are_refused_with_the_numbers(weights, monkeypatch):
    monkeypatch.setattr(shared_memory, "available_memory", lambda: 2**10)
    with pytest.raises(MemoryError, match=r"^0\.\d\d GiB of memory is needed; .* is available"):
        SharedWeights(weights, "mark")


def test_weights_with_a_missing_tensor_are_refused(weights):
    del weights["decoder.norm_out.gamma"]
    with pytest.raises(CheckpointError, match=r"The VAE .* lacks 'decoder.norm_out.gamma'"):
        SharedWeights(weights, "mark")


def test_a_fingerprint_depends_only_on_the_decoder_and_refuses_unloaded_weights(weights):
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
def test_a_fingerprint_does_not_depend_on_the_devices(weights):
    before = fingerprint(weights)
    moved = {key: tensor.cuda() if i % 2 else tensor for i, (key, tensor) in enumerate(weights.items())}
    assert fingerprint(moved) == before


@pytest.mark.parametrize("state", [{1: torch.zeros(1)}, {"decoder.conv_in.conv.weight": [1.0]}, {("a", "b"): None}])
def test_objects_that_are_not_state_dicts_are_refused(state):
    for use in (check_state_dict, fingerprint):
        with pytest.raises(CheckpointError, match="not a state dict"):
            use(state)


def test_integer_weights_are_refused(weights, tmp_path):
    weights["decoder.conv_out.conv.bias"] = torch.zeros(3, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="I8"):
        open_checkpoint(save(weights, tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match="int8"):
        SharedWeights(weights, "mark")
