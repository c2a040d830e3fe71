"""The fast transformer, called as diffusers' pipelines call theirs."""

import copy

import pytest
import torch

from distributed.denoise.loading import streamed_bytes
from distributed.denoise.module import fast_module
from distributed.denoise.transformer import Transformer
from tests.unit.denoise_models import make_inputs, make_model


@pytest.fixture
def model():
    return make_model(use_meanflow=True)


def close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    return result.shape == expected.shape and (result - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("image", [True, False])
def test_the_fast_module_has_the_interface_and_results_of_diffusers(model, image):
    inputs = make_inputs(model, text=(4, 9), glyphs=(0, 6), image=image)
    expected = model(**inputs).sample
    shell = fast_module(model)
    assert close(shell(**inputs).sample, expected) and close(shell(**inputs, return_dict=False)[0], expected)
    assert shell.dtype == model.dtype and shell.config is model.config


def test_the_model_keeps_its_forward_and_shares_its_weights(model):
    inputs = make_inputs(model)
    shell = fast_module(model)
    before = shell(**inputs).sample
    assert "forward" not in vars(model) and list(map(id, shell.parameters())) == list(map(id, model.parameters()))
    model.proj_out.weight.mul_(2)  # weights may change while the fast module exists
    model.proj_out.bias.mul_(2)
    assert close(fast_module(model)(**inputs).sample, 2 * before) and close(shell(**inputs).sample, 2 * before)


def test_a_module_with_streamed_blocks_has_the_bits_of_one_with_resident_weights(model):
    inputs, weights = make_inputs(model, text=(4, 9), glyphs=(0, 6)), list(map(id, model.parameters()))
    blocks = []
    shell = fast_module(model, lambda *progress: blocks.append(progress), torch.device("cpu"))
    assert torch.equal(shell(**inputs).sample, fast_module(model)(**inputs).sample)
    assert blocks == [(1, 3), (2, 3), (3, 3)] * 2
    assert list(map(id, model.parameters())) == weights and shell.dtype == model.dtype


def test_a_module_with_streamed_blocks_takes_two_blocks_and_the_rest_of_the_device(model):
    transformer = fast_module(model, stream_to=torch.device("cpu")).forward.transformer
    modules = [transformer.model, *transformer.blocks.slots]
    found = sum(part.nbytes for module in modules for part in module.parameters() if not part.is_meta)
    assert len(transformer.blocks.slots) == 2 and found == streamed_bytes(model) < sum(
        part.nbytes for part in model.parameters()
    )


def test_hooks_of_the_model_run_for_the_fast_module(model):
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    fast_module(model)(**make_inputs(model))
    hook.remove()
    assert calls == [1]


def test_results_for_conditions_and_timesteps_are_cached_separately(model, monkeypatch):
    computed = []
    for name in ("encode", "modulation"):
        original = getattr(Transformer, name)

        def counted(self, *arguments, name=name, original=original):
            computed.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(Transformer, name, counted)
    positive = make_inputs(model)
    negative = positive | make_inputs(model, text=(7,), seed=5)
    negative |= {name: positive[name] for name in ("hidden_states", "timestep", "timestep_r", "image_embeds")}
    shell = fast_module(model)
    for timestep in (900.0, 300.0):
        time = {"timestep": torch.tensor([timestep])}
        for inputs in (positive, negative):
            assert close(shell(**inputs | time).sample, model(**inputs | time).sample)
    assert sorted(computed) == ["encode"] * 2 + ["modulation"] * 2
    changed = positive | {"encoder_hidden_states": copy.deepcopy(negative["encoder_hidden_states"])}
    assert close(shell(**changed).sample, model(**changed).sample)
