"""A transformer that exists only in memory: shared with ranks once, tensor by tensor, in the dtypes that it has."""

import stat
import weakref

import pytest
import torch
from torch import Tensor

from distributed.denoise.handover import share_transformer
from distributed.denoise.layout import Architecture
from distributed.denoise.task import DenoiseTask
from distributed.denoise.weights import stored_tensors
from distributed.errors import CheckpointError
from distributed.ranks import shared_memory
from distributed.ranks.shared_memory import place_of, shared_file
from distributed.shared_weights import LazyTensor
from tests.unit.core_inputs import core_inputs, job_of, random_weights
from tests.unit.denoise_models import run


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(Architecture(heads=2, layers=2))


def stored(checkpoint) -> dict[str, Tensor]:
    return {key: stored.tensor for key, stored in stored_tensors(checkpoint)}


def test_tensors_are_read_once_and_one_by_one_into_a_private_file(weights):
    read, alive = [], weakref.WeakSet()

    def lazy(key: str) -> LazyTensor:
        def copy() -> Tensor:
            assert not alive, "the tensor before is still held"
            read.append(key)
            tensor = weights[key].clone()
            alive.add(tensor)
            return tensor

        return LazyTensor(tuple(weights[key].shape), weights[key].dtype, copy)

    shared = share_transformer(
        {key: lazy(key) for key in weights} | {"unused.weight": lazy("img_in.proj.bias")}, "mark"
    )
    checkpoint = shared.checkpoint
    assert sorted(read) == sorted(weights)
    assert (checkpoint.layout, checkpoint.identity) == ("core", "mark")
    assert stat.S_IMODE(checkpoint.path.stat().st_mode) == 0o600
    found = stored(checkpoint)
    assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)
    with pytest.raises(PermissionError), open(checkpoint.path, "r+b") as file:
        file.write(b"other")


def test_a_rank_computes_with_shared_weights_and_patches_while_other_memory_is_shared(weights):
    """A rank opens shared memory only to read it, so that it is freed with its owner."""
    one, other = share_transformer(weights, "one"), share_transformer(random_weights(Architecture(heads=1)), "other")
    task = DenoiseTask(torch.device("cpu"))
    inputs = core_inputs()
    first = run(task, job_of(one.checkpoint, inputs))
    second = run(task, job_of(other.checkpoint, inputs))
    assert torch.equal(run(task, job_of(one.checkpoint, inputs)), first) and not torch.equal(first, second)
    place = place_of(other.checkpoint.path)
    del other
    with pytest.raises(OSError), shared_file(place):
        pass
    task.release()
    assert torch.equal(run(task, job_of(one.checkpoint, inputs)), first)


def test_8_bit_weights_and_their_scales_are_shared_as_they_are(weights):
    key = "double_blocks.0.img_mlp.0"
    scaled = weights | {
        f"{key}.weight": weights[f"{key}.weight"].to(torch.float8_e4m3fn),
        f"{key}.scale_weight": torch.tensor(3.0),
        f"{key}.comfy_quant": torch.zeros(9, dtype=torch.uint8),
    }
    shared = share_transformer(scaled, "mark")
    (found,) = (stored for name, stored in stored_tensors(shared.checkpoint) if name == f"{key}.weight")
    assert found.tensor.dtype == torch.float8_e4m3fn and found.scale == 3.0


def test_spellings_of_norms_are_those_of_core(weights):
    spelled = {f"diffusion_model.{key.replace('_norm.weight', '_norm.scale')}": value for key, value in weights.items()}
    assert stored(share_transformer(spelled, "mark").checkpoint).keys() == weights.keys()


def test_weights_that_do_not_fit_into_memory_are_refused_with_the_numbers(weights, monkeypatch):
    monkeypatch.setattr(shared_memory, "available_memory", lambda: 2**10)
    with pytest.raises(MemoryError, match=r"^0\.\d\d GiB of memory is needed; .* is available"):
        share_transformer(weights, "mark")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"single_blocks.0.linear1.weight": torch.zeros(1)}, "^The transformer is a transformer with single-stream"),
        ({"img_in.proj.bias": torch.zeros(256, device="meta")}, "was not loaded: its 'img_in.proj.bias'"),
        ({"img_in.proj.bias": torch.zeros(256, dtype=torch.int8)}, "as torch.int8"),
        ({"img_in.proj.weight": torch.zeros(256, 65, 1, 2, 2)}, "instead of"),
        ({"img_in.proj.weight_scale": torch.tensor(torch.nan)}, "of nan; a scale must be a finite number"),
    ],
)
def test_tensors_that_are_no_whole_transformer_are_refused(change, words, weights):
    with pytest.raises(CheckpointError, match=words):
        share_transformer(weights | change, "mark")


def test_a_tensor_that_is_not_what_was_announced_is_refused(weights):
    wrong = LazyTensor((256,), torch.float32, lambda: torch.zeros(255))
    with pytest.raises(ValueError, match=r"img_in.proj.bias has shape \[255\]"):
        share_transformer(weights | {"img_in.proj.bias": wrong}, "mark")
