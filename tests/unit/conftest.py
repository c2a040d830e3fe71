"""Fixtures of the unit tests."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15

from benchmarks.random_weights import FULL
from distributed.vae.hunyuanvideo15.layout import Architecture
from distributed.vae.hunyuanvideo15.weights import Weights
from tests.unit.checkpoints import in_core_layout, make_model


@pytest.fixture(scope="session", autouse=True)
def no_process_and_no_comfyui() -> Iterator[None]:
    """Fail tests that start a process or import ComfyUI: they belong to the other folders.

    With a GPU processes are allowed, because Triton starts compilers.
    """

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tests/unit starts no processes; move this test to another folder")

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(subprocess.Popen, "__init__", refuse)
            patch.setattr(multiprocessing.Process, "start", refuse)
        yield
    assert "comfy" not in sys.modules, "tests/unit imports no ComfyUI"


@pytest.fixture(scope="session")
def full_size() -> Callable[[], Weights]:
    """Return a function that makes the decoder's weights in full size on the meta device."""

    def make() -> Weights:
        shapes = Architecture(FULL).decoder_shapes()
        tensors = {key.removeprefix("decoder."): torch.empty(shape, device="meta") for key, shape in shapes.items()}
        return Weights(tensors, torch.device("meta"), torch.bfloat16)

    return make


@pytest.fixture(scope="module")
def model() -> AutoencoderKLHunyuanVideo15:
    """A small VAE of diffusers'."""
    return make_model()


@pytest.fixture
def weights(model) -> dict[str, torch.Tensor]:
    """Its weights with diffusers' names."""
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


@pytest.fixture
def core(weights) -> dict[str, torch.Tensor]:
    """The same weights with core's names."""
    return in_core_layout(weights)
