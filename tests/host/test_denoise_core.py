"""Forwards of a rank compared with those of core's own network: conditions, times, dtypes and patches."""

import re

import pytest
import torch
from core_transformer import module_shapes, run_core
from safetensors.torch import save_file
from torch import Tensor

from distributed.denoise.job import Conditions
from distributed.denoise.layout import Architecture
from distributed.denoise.task import DenoiseTask
from distributed.denoise.weights import core_shapes, open_transformer
from tests.unit.core_inputs import core_inputs, job_of, random_weights
from tests.unit.denoise_models import error, run

SIZES = {"heads": 2, "layers": 2}
MODEL = {"width": 256, "layers": 2}
SIGMAS = torch.tensor([1.0, 0.731, 0.402, 0.0])
MASK = torch.tensor([[0, 1, 1, 0, 1, 1, 0]])

PLAIN = {
    "text": core_inputs(),
    "glyphs": core_inputs(glyphs=3),
    "image": core_inputs(image=4),
    "glyphs and image": core_inputs(glyphs=3, image=4),
    "an image of zeros": core_inputs(image=4) | {"clip_fea": torch.zeros(1, 4, 1152)},
    "two videos": core_inputs(videos=2, glyphs=3, image=4),
    "two videos of text": core_inputs(videos=2),
    "a mask": core_inputs() | {"attention_mask": MASK},
}
FORWARDS = {name: {"model": MODEL, "weights": "plain", "inputs": inputs} for name, inputs in PLAIN.items()}
FORWARDS["98 channels"] = {"model": MODEL | {"in_channels": 98}, "weights": "sr", "inputs": core_inputs(98)}
FLOW = {"model": MODEL | {"in_channels": 98, "meanflow": True}, "weights": "flow", "inputs": core_inputs(98, videos=2)}
FORWARDS["a second time"] = FLOW | {"sigmas": SIGMAS, "step": 1}
FORWARDS["averaged times"] = FLOW | {"model": FLOW["model"] | {"averaged": True}, "sigmas": SIGMAS, "step": 1}
FORWARDS["no second time"] = FLOW
FORWARDS["float16"] = FORWARDS["glyphs and image"] | {"dtype": "float16"}
FORWARDS["bfloat16"] = FORWARDS["glyphs and image"] | {"dtype": "bfloat16"}
FORWARDS["text beyond float16"] = FORWARDS["text"] | {"weights": "loud", "dtype": "float16"}


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, Tensor]]:
    found = {
        "plain": random_weights(Architecture(**SIZES)),
        "sr": random_weights(Architecture(98, **SIZES)),
        "flow": random_weights(Architecture(98, meanflow=True, **SIZES)),
    }
    found["loud"] = dict(found["plain"])  # the first block's text overflows in float16
    found["loud"]["double_blocks.0.txt_mlp.2.weight"] = found["plain"]["double_blocks.0.txt_mlp.2.weight"] * 2e5
    return found


@pytest.fixture(scope="module")
def expected(weights, tmp_path_factory) -> dict[str, Tensor]:
    return run_core(tmp_path_factory.mktemp("core"), weights, FORWARDS)


@pytest.fixture(scope="module")
def checkpoints(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, state in weights.items():
        save_file(state, folder / f"{name}.safetensors")
    return {name: open_transformer(folder / f"{name}.safetensors") for name in weights}


def compute(checkpoints, name: str) -> Tensor:
    """The forward of a case by a rank, with the times that the case has."""
    case = FORWARDS[name]
    options = {"dtype": case.get("dtype")}
    if "sigmas" in case:
        options |= {"time": float(SIGMAS[1] * 1000), "timestep_r": float(SIGMAS[2] * 1000)}
        options |= {"averaged_times": case["model"].get("averaged", False)}
    return run(DenoiseTask(torch.device("cpu")), job_of(checkpoints[case["weights"]], case["inputs"], **options))


EXACT = sorted(FORWARDS.keys() - {"float16", "bfloat16", "text beyond float16", "a second time", "averaged times"})


@pytest.mark.parametrize("name", EXACT)
def test_a_forward_equals_cores(name, checkpoints, expected):
    assert error(compute(checkpoints, name), expected[name]) < 1e-5


def test_the_second_time_is_added_or_averaged_as_core_does(checkpoints, expected):
    """ComfyUI 0.3.75 can only average, later versions can do both."""
    added, averaged = compute(checkpoints, "a second time"), compute(checkpoints, "averaged times")
    assert error(averaged, expected["averaged times"]) < 1e-5
    assert error(added, averaged) > 1e-2
    if error(expected["a second time"], expected["averaged times"]) > 1e-5:
        assert error(added, expected["a second time"]) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_forward_in_16_bits_is_as_exact_as_cores(dtype, checkpoints, expected):
    exact = expected["glyphs and image"]
    assert 1e-5 < error(compute(checkpoints, dtype), exact) < 1.2 * error(expected[dtype], exact)


def test_text_that_overflows_in_float16_is_clamped_as_in_core(checkpoints, expected):
    assert error(compute(checkpoints, "text beyond float16"), expected["text beyond float16"]) < 1e-2


def test_an_image_of_zeros_is_an_image_for_core_and_none_for_diffusers(checkpoints):
    inputs = FORWARDS["an image of zeros"]["inputs"]
    of_core = Conditions.of_core(checkpoints["plain"], inputs["context"], clip_fea=inputs["clip_fea"])
    of_diffusers = Conditions.make(checkpoints["plain"], inputs["context"], image_embeds=inputs["clip_fea"])
    assert of_core.tensors["image.0"].shape == (4, 1152) and of_diffusers.tensors["image.0"].shape == (0, 1152)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"context": torch.zeros(1, 7, 3583)}, "The text has shape"),
        ({"context": torch.zeros(1, 0, 3584)}, "no valid token"),
        ({"attention_mask": MASK.float()}, "integers 0 and 1"),
        ({"attention_mask": 2 * MASK}, "integers 0 and 1"),
        ({"attention_mask": 0 * MASK}, "no valid token"),
        ({"attention_mask": MASK[:, 1:]}, "The text's mask has shape"),
        ({"attention_mask": MASK, "clip_fea": torch.zeros(1, 4, 1152)}, "cannot have glyph text or an image"),
        ({"txt_byt5": torch.zeros(2, 4, 1472)}, "The glyphs has shape"),
        ({"latents": torch.zeros(2, 33, 2, 3, 5)}, "The latents have shape"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(change, words, checkpoints):
    with pytest.raises(ValueError, match=words):
        Conditions.of_core(checkpoints["plain"], **{"context": PLAIN["text"]["context"]} | change)


def test_other_dtypes_and_a_second_time_for_other_models_are_refused(checkpoints):
    for options, words in (({"dtype": "int8"}, "dtype is int8"), ({"timestep_r": 402.0}, "Meanflow")):
        with pytest.raises(ValueError, match=words):
            job_of(checkpoints["plain"], PLAIN["text"], **options)


def test_names_and_shapes_are_those_of_cores_module():
    named = {re.sub(r"_norm\.scale$", "_norm.weight", key): shape for key, shape in module_shapes().items()}
    assert named == core_shapes(Architecture(heads=1, layers=1))
