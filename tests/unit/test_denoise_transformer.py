"""The transformer compared with diffusers' forward, and its lack of padding, masks and synchronisation."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.denoise.conditions import trim
from distributed.denoise.transformer import Transformer
from tests.unit.denoise_models import error, make_inputs, make_model


def conditions(inputs: dict[str, Tensor]) -> tuple:
    names = ["encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_2", "encoder_attention_mask_2"]
    return trim(*(inputs[name] for name in names), inputs["image_embeds"])


@torch.inference_mode()
def ours(model, inputs: dict[str, Tensor]) -> Tensor:
    """Return our predictions for the videos of the batch, computed one after the other."""
    transformer, predictions = Transformer(model), []
    modulation = transformer.modulation(inputs["timestep"], inputs.get("timestep_r"))
    for i, condition in enumerate(conditions(inputs)):
        latent, timestep = inputs["hidden_states"][i], inputs["timestep"][i : i + 1]
        rows = transformer.forward(latent, timestep, transformer.encode(condition), modulation[i])
        predictions.append(transformer.unpatchify(rows, latent))
    return torch.stack(predictions)


@torch.inference_mode()
def theirs(model, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


CASES = {
    "text to video": {"image": False},
    "image to video": {},
    "one token": {"text": (1,), "glyphs": (0,), "image": False},
    "all tokens": {"text": (9,), "glyphs": (6,)},
    "no glyphs": {"glyphs": (0,)},
    "no glyphs, no image": {"glyphs": (0,), "image": False},
    "one latent position": {"latent": (1, 1, 1)},
    "odd sizes": {"latent": (2, 7, 3)},
    "two videos": {"text": (2, 9), "glyphs": (6, 0)},
    "two videos from text": {"text": (9, 1), "glyphs": (0, 4), "image": False},
    "full padded lengths, only the template's tokens": {
        "text": (5, 100),
        "glyphs": (0, 30),
        "image": False,
        "padded": (1000, 256, 729),
    },
    "full padded lengths, all valid": {"text": (1000,), "glyphs": (256,), "padded": (1000, 256, 729)},
}


CONFIGS = {
    "meanflow": {"use_meanflow": True},
    "patches of two": {"patch_size": 2},
    "three heads and one block": {"num_attention_heads": 3, "num_layers": 1},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_prediction_equals_that_of_diffusers(case):
    model = make_model()
    inputs = make_inputs(model, **case)
    assert error(ours(model, inputs), theirs(model, inputs)) < 1e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("case", ["text to video", "image to video", "two videos"])
def test_other_configurations_equal_diffusers_too(case, config):
    model = make_model(**config)
    inputs = make_inputs(model, latent=(3, 4, 6), **CASES[case])
    assert error(ours(model, inputs), theirs(model, inputs)) < 1e-5


def test_valid_tokens_may_be_at_any_position_and_padding_is_never_read():
    model = make_model()
    inputs = make_inputs(model, text=(4,), glyphs=(2,))
    inputs["encoder_attention_mask"] = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 0, 1]])
    expected = theirs(model, inputs)
    assert error(ours(model, inputs), expected) < 1e-5
    inputs["encoder_hidden_states"][:, 0] = float("nan")
    assert error(ours(model, inputs), expected) < 1e-5


@pytest.mark.parametrize(
    "change", ["encoder_hidden_states", "encoder_hidden_states_2", "image_embeds", "timestep", "hidden_states"]
)
def test_every_input_affects_the_prediction(change):
    model = make_model()
    inputs = make_inputs(model)
    assert error(ours(model, inputs | {change: 1.1 * inputs[change].flip(-1)}), ours(model, inputs)) > 1e-4


def test_a_text_without_a_valid_token_is_refused():
    inputs = make_inputs(make_model(), text=(3, 0), glyphs=(1, 1))
    with pytest.raises(ValueError, match="video 1 has no valid token"):
        conditions(inputs)


def test_a_layer_with_an_adapter_is_refused():
    model = make_model()
    layer = model.transformer_blocks[0].attn.to_q
    layer.base_layer = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn.to_q has an adapter \(Linear\)"):
        Transformer(model)


@pytest.mark.parametrize("image", [False, True])
def test_the_error_in_bfloat16_is_not_larger_than_that_of_diffusers(image):
    model = make_model(num_layers=8, num_attention_heads=8)
    inputs = make_inputs(model, latent=(3, 8, 9), text=(40,), glyphs=(9,), image=image, padded=(50, 20, 30))
    expected = theirs(model, inputs)
    rounded = copy.deepcopy(model).bfloat16()
    inputs = {name: value.bfloat16() for name, value in inputs.items()}
    assert error(ours(rounded, inputs), expected) <= 1.05 * error(theirs(rounded, inputs), expected)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_as_large_as_a_mask():
    model = make_model()
    inputs = make_inputs(model, latent=(5, 11, 12))
    tokens = 5 * 11 * 12
    largest = {}
    for forward in (ours, theirs):
        with LargestTensor() as seen:
            forward(model, inputs)
        largest[forward] = seen.elements
    widest = tokens * 4 * 16 * 3  # the MLP's inner tensor is twice the width
    assert largest[ours] <= widest < tokens**2 <= largest[theirs]


def test_a_forward_never_reads_a_value_from_the_device():
    """A meta tensor has no values, so reading one raises an error."""
    model = make_model()
    inputs = make_inputs(model)
    (condition,) = conditions(inputs)
    model.to("meta")
    latent = inputs["hidden_states"][0].to("meta")
    condition = type(condition)(*(None if part is None else part.to("meta") for part in vars(condition).values()))
    transformer, timestep = Transformer(model), inputs["timestep"].to("meta")
    (modulation,) = transformer.modulation(timestep)
    with torch.inference_mode():
        rows = transformer.forward(latent, timestep, transformer.encode(condition), modulation)
    assert transformer.unpatchify(rows, latent).shape == (4, 3, 4, 5) and rows.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        theirs(model, {name: value.to("meta") for name, value in inputs.items()})


def test_modulation_of_a_schedule_equals_that_of_each_step():
    transformer = Transformer(make_model(use_meanflow=True))
    timesteps, seconds = torch.tensor([1000.0, 731.0, 12.5]), torch.tensor([731.0, 12.5, 0.0])
    for i, whole in enumerate(transformer.modulation(timesteps, seconds)):
        (one,) = transformer.modulation(timesteps[i : i + 1], seconds[i : i + 1])
        torch.testing.assert_close(whole.blocks, one.blocks)
        torch.testing.assert_close(whole.final, one.final)


def test_on_block_is_called_after_each_block_and_can_end_the_forward():
    model = make_model()
    inputs = make_inputs(model)
    transformer = Transformer(model)
    context, (modulation,) = transformer.encode(conditions(inputs)[0]), transformer.modulation(inputs["timestep"])
    arguments = inputs["hidden_states"][0], inputs["timestep"], context, modulation
    seen = []
    transformer.forward(*arguments, on_block=lambda *progress: seen.append(progress))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(done: int, blocks: int) -> None:
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        transformer.forward(*arguments, on_block=stop)
    assert seen == [1, 2]


def test_a_forward_is_deterministic_and_does_not_change_its_inputs():
    model = make_model()
    inputs = make_inputs(model)
    before = copy.deepcopy(inputs)
    first = ours(model, inputs)
    assert torch.equal(ours(model, inputs), first)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_one_transformer_accepts_different_shapes_in_turn():
    model = make_model()
    transformer = Transformer(model)
    for latent in ((3, 4, 5), (3, 5, 4), (1, 4, 5), (3, 4, 5)):
        inputs = make_inputs(model, latent=latent)
        (modulation,) = transformer.modulation(inputs["timestep"])
        context = transformer.encode(conditions(inputs)[0])
        rows = transformer.forward(inputs["hidden_states"][0], inputs["timestep"], context, modulation)
        assert error(transformer.unpatchify(rows, inputs["hidden_states"][0])[None], theirs(model, inputs)) < 1e-5
