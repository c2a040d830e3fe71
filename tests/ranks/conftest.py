"""Groups of real rank processes on gloo, and small checkpoints for them."""

import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.random_weights import FULL, TINY, decoder_tensors
from distributed import RankGroup

CPU = torch.device("cpu")
ECHO = "tests.ranks.misbehaving"


@pytest.fixture(scope="session", autouse=True)
def temporary(tmp_path_factory):
    """A temporary folder of these tests' own, which must hold nothing of ours at their end."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        yield folder
    assert not list(folder.glob("hv15-*"))


@pytest.fixture(scope="session")
def weights() -> dict:
    """A small decoder's state dict, as a VAE would give it."""
    return {f"decoder.{name}": tensor for name, tensor in decoder_tensors(TINY, CPU).items()}


@pytest.fixture(scope="session")
def vae(weights, tmp_path_factory) -> Path:
    """The same on disk."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="session")
def full(tmp_path_factory) -> Path:
    """A checkpoint of the real size, for tests on GPUs."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("full") / "vae.safetensors"
    tensors = decoder_tensors(FULL, torch.device("cuda"))
    save_file({f"decoder.{key}": value.bfloat16().cpu() for key, value in tensors.items()}, path)
    del tensors
    torch.cuda.empty_cache()
    return path


@pytest.fixture(scope="module")
def pair(vae):
    """Two ranks, warm, for all tests of a module."""
    with RankGroup(devices=["cpu", "cpu"]) as group:
        yield group


@pytest.fixture(scope="module")
def echoes(tmp_path_factory):
    """Two ranks that run `Echo` jobs, and misbehave when told to, for all tests of a module."""
    logs = tmp_path_factory.mktemp("logs")
    with RankGroup(["cpu", "cpu"], worker=ECHO, logs=logs, stall_timeout=5) as group:
        yield group


@pytest.fixture
def once(tmp_path) -> Path:
    """A file for faults that are done once."""
    path = tmp_path / "once"
    path.touch()
    return path
