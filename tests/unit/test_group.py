"""Options and input that a rank group refuses, and its status, before any process is started."""

import pytest
import torch

from distributed import JobError, RankGroup

LATENT = torch.zeros(1, 32, 1, 1, 1)


@pytest.mark.parametrize("name", ["start_timeout", "stall_timeout"])
@pytest.mark.parametrize("value", ["120", None, -5, 0, float("nan"), float("inf"), True, [1], 1j])
def test_an_invalid_timeout_is_refused_and_no_option_changes(name, value):
    group = RankGroup(["cpu"], stall_timeout=7)
    with pytest.raises(ValueError, match=f"{name} is .*; it must be a positive number of seconds"):
        group.configure(dtype="float16", keep_loaded="stop", **{name: value})
    assert (group.dtype, group.keep_loaded, group.start_timeout, group.stall_timeout) == ("float32", "keep", 180, 7)
    with pytest.raises(ValueError, match=name):
        RankGroup(["cpu"], **{name: value})


@pytest.mark.parametrize(("option", "value"), [("dtype", "float8"), ("keep_loaded", "always"), ("dtype", None)])
def test_an_option_with_an_unknown_value_is_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} is .*; it must be"):
        RankGroup(["cpu"], **{option: value})


@pytest.mark.parametrize("memory", [float("nan"), float("inf"), 0, -1, "4GB", 1.5e9, 2**70])
def test_an_invalid_memory_limit_is_refused_before_any_process_starts(memory, vae_file):
    group = RankGroup(["cpu"])
    with pytest.raises(JobError, match="memory is"):
        group.decode(LATENT, vae_file, memory=memory)
    assert group.status()["state"] == "stopped"


@pytest.mark.parametrize("timeout", [float("nan"), -1, "60"])
def test_an_invalid_timeout_of_a_decode_is_refused_before_any_process_starts(timeout, vae_file):
    group = RankGroup(["cpu"])
    with pytest.raises(ValueError, match="timeout is"):
        group.decode(LATENT, vae_file, timeout=timeout)
    assert group.status()["state"] == "stopped"


def test_a_group_that_was_never_started_reports_its_ranks_as_stopped():
    status = RankGroup(["cpu", "cpu"]).status()
    assert status["state"] == "stopped" and status["job"] is None and status["error"] is None
    rank = {"rank": 1, "pid": None, "device": "cpu", "state": "stopped", "done": 0, "total": 0}
    assert status["ranks"][1] == rank


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    from safetensors.torch import save_file

    from benchmarks.random_weights import TINY, decoder_tensors

    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    tensors = decoder_tensors(TINY, torch.device("cpu"))
    save_file({f"decoder.{name}": tensor for name, tensor in tensors.items()}, path)
    return path
