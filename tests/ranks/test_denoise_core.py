"""Models that core loaded, on real ranks: handed over in memory, patched, in other dtypes, with core's results."""

import pytest
import torch
from torch import Tensor

from distributed import RankGroup
from distributed.denoise.denoiser import Denoiser
from distributed.denoise.handover import share_transformer
from distributed.denoise.job import Conditions
from distributed.denoise.layout import Architecture
from distributed.denoise.merge import Patch
from distributed.denoise.patches import Patches
from tests.host.core_transformer import run_core
from tests.ranks.test_denoise_task import counted
from tests.unit.core_inputs import core_inputs, random_weights

SIZES = {"heads": 2, "layers": 2}
MODEL = {"width": 256, "layers": 2}
SIGMAS = torch.tensor([1.0, 0.731, 0.402, 0.0])
VIDEO, UPSCALED = core_inputs(glyphs=3, image=4), core_inputs(98, text=5)
KEY = "double_blocks.1.img_attn.qkv.weight"


def lora(strength: float) -> Patch:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(768, 4, generator=generator), torch.randn(4, 256, generator=generator) / 16
    return Patch("lora", strength, tensors={"up": up, "down": down}, alpha=2.0)


FORWARDS = {
    "video": {"model": MODEL, "weights": "video", "inputs": VIDEO},
    "negative": {"model": MODEL, "weights": "video", "inputs": core_inputs(text=3) | {"x": VIDEO["x"]}},
}
FORWARDS["patched"] = FORWARDS["video"] | {"patches": {KEY: [lora(0.7)]}}
FORWARDS["no second time"] = {
    "model": MODEL | {"in_channels": 98, "meanflow": True, "averaged": True},
    "weights": "upscaling",
    "inputs": UPSCALED,
}
FORWARDS["averaged times"] = FORWARDS["no second time"] | {"sigmas": SIGMAS, "step": 1}


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, Tensor]]:
    return {
        "video": random_weights(Architecture(**SIZES)),
        "upscaling": random_weights(Architecture(98, meanflow=True, **SIZES)),
    }


@pytest.fixture(scope="module")
def expected(weights, tmp_path_factory) -> dict[str, Tensor]:
    return run_core(tmp_path_factory.mktemp("core"), weights, FORWARDS)


@pytest.fixture(scope="module")
def shared(weights):
    return {name: share_transformer(state, name) for name, state in weights.items()}


@pytest.fixture(scope="module")
def pair():
    with RankGroup(["cpu", "cpu"]) as group:
        yield group


def prepare(denoiser: Denoiser, inputs: dict[str, Tensor]) -> tuple[Tensor, Conditions]:
    """The noise, and the conditions with the other channels."""
    rest = {name: value for name, value in inputs.items() if name != "x"}
    x = inputs["x"]
    return x[:, :32], Conditions.of_core(denoiser.checkpoint, **rest, latents=x[:, 32:])


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_a_handed_over_model_gives_cores_results_with_patches_that_come_and_go(pair, shared, expected, monkeypatch):
    denoiser = Denoiser(shared["video"].checkpoint, pair.run)
    noise, condition = prepare(denoiser, VIDEO)
    _, negative = prepare(denoiser, FORWARDS["negative"]["inputs"])
    sets = {strength: Patches.make(denoiser.checkpoint, {KEY: [lora(strength)]}) for strength in (0.7, 0.3)}
    original = denoiser(noise, 731.0, [condition, negative])
    close(original, torch.stack([expected["video"], expected["negative"]]))
    patched = denoiser(noise, 731.0, [condition, negative], patches=sets[0.7])
    close(patched[0], expected["patched"])
    weaker = denoiser(noise, 731.0, [condition, negative], patches=sets[0.3])
    assert not torch.allclose(weaker, patched, atol=1e-3) and not torch.allclose(weaker, original, atol=1e-3)
    sent = counted(pair, monkeypatch)
    assert torch.equal(denoiser(noise, 731.0, [condition, negative], patches=sets[0.7]), patched)
    assert torch.equal(denoiser(noise, 731.0, [condition, negative]), original)
    again = Patches.make(denoiser.checkpoint, {KEY: [lora(0.7)]})
    assert torch.equal(denoiser(noise, 731.0, [condition, negative], patches=again), patched)
    assert sent == ["Run"] * 3
    pair.release()
    assert torch.equal(denoiser(noise, 731.0, [condition, negative], patches=again), patched)


def test_a_step_may_have_another_dtype_than_the_group(pair, shared, expected):
    denoiser = Denoiser(shared["video"].checkpoint, pair.run)
    noise, condition = prepare(denoiser, VIDEO)
    for dtype in (torch.float16, "bfloat16"):
        (rounded,) = denoiser(noise, 731.0, [condition], dtype=dtype)
        assert 1e-4 < (rounded - expected["video"]).norm() / expected["video"].norm() < 2e-2
    (exact,) = denoiser(noise, 731.0, [condition])
    close(exact, expected["video"])


def test_a_model_for_upscaling_takes_98_channels_and_a_second_time_or_none(pair, shared, expected):
    denoiser = Denoiser(shared["upscaling"].checkpoint, pair.run)
    noise, condition = prepare(denoiser, UPSCALED)
    time, second = float(SIGMAS[1] * 1000), float(SIGMAS[2] * 1000)
    for _ in range(2):
        (velocity,) = denoiser(noise, 731.0, [condition])
        close(velocity, expected["no second time"])
        (velocity,) = denoiser(noise, time, [condition], timestep_r=second, averaged_times=True)
        close(velocity, expected["averaged times"])
        (added,) = denoiser(noise, time, [condition], timestep_r=second)
        assert not torch.allclose(added, velocity, atol=1e-3)
