"""Fixtures of the unit tests."""

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15

from benchmarks.random_weights import FULL
from distributed.vae.hunyuanvideo15.layout import Architecture
from distributed.vae.hunyuanvideo15.weights import Weights
from tests.unit.checkpoints import in_core_layout, make_model


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
