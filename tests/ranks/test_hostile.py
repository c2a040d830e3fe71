"""Arbitrary and damaged input is decoded or refused with a clear message, and the ranks keep running."""

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.random_weights import random_latent
from distributed import JobError, RankGroup
from distributed.ranks.devices import parse_devices

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
unharmed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@unharmed
@given(
    shape=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    channels=st.sampled_from([32, 32, 32, 16, 1]),
    dtype=st.sampled_from(DTYPES),
    bad=st.sampled_from([None, None, float("nan"), float("inf")]),
    mode=st.sampled_from(["seamless", "tiled", "", "SEAMLESS"]),
    tile_size=st.sampled_from([32, 48, 256, 0, -16, 17, 2**62, 256.0, "256"]),
    overlap=st.sampled_from([0, 16, 24, -16, 256, 2**62, 16.0]),
    memory=st.sampled_from([None, None, 2**62, 2**70, 0, -1, 1.5e9, float("nan"), "4GB", np.int64(2**40)]),
)
def test_any_latent_and_options_are_decoded_or_refused(
    pair, vae, shape, channels, dtype, bad, mode, tile_size, overlap, memory
):
    if len(shape) > 1:
        shape[1] = channels
    latent = torch.zeros(shape).to(dtype)
    if bad and latent.numel() and latent.is_floating_point():
        latent.view(-1)[-1] = bad
    pids = [rank["pid"] for rank in pair.status()["ranks"]]
    try:
        frames = pair.decode(latent, vae, mode, tile_size=tile_size, overlap=overlap, memory=memory)
    except JobError as error:
        names = ("latent", "mode", "tile_size", "overlap", "memory", "GiB")
        assert any(name in str(error) for name in names), error
    else:
        batch, _, time, height, width = shape
        assert frames.shape == (batch, 4 * time - 3, 16 * height, 16 * width, 3) and frames.isfinite().all()
    assert [rank["pid"] for rank in pair.status()["ranks"]] == pids


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_checkpoint_is_refused_or_decoded(pair, vae, tmp_path, seed):
    """Bytes of the header are changed, or the file is truncated or extended, at random."""
    chance = random.Random(seed)
    content = bytearray(vae.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    match chance.choice(["header", "header", "cut", "append", "length"]):
        case "header":
            for _ in range(chance.randint(1, 4)):
                content[chance.randrange(header)] = chance.randrange(256)
        case "cut":
            del content[chance.randrange(len(content)) :]
        case "append":
            content += bytes(chance.randint(1, 100))
        case "length":
            content[:8] = chance.choice([0, 1, header * 2, 2**32, 2**63, 2**64 - 1]).to_bytes(8, "little")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(content)
    pids = [rank["pid"] for rank in pair.status()["ranks"]]
    try:
        pair.decode(random_latent(1, 32, 1, 1, 2), damaged)
    except JobError as error:
        assert "damaged.safetensors" in str(error)
    assert [rank["pid"] for rank in pair.status()["ranks"]] == pids
    assert pair.decode(random_latent(1, 32, 1, 1, 2), vae).isfinite().all()


def test_a_checkpoint_that_is_deleted_or_truncated_between_decodes_is_refused(pair, vae, tmp_path):
    going = tmp_path / "going.safetensors"
    going.write_bytes(vae.read_bytes())
    pair.decode(random_latent(1, 32, 1, 1, 2), going)
    pids = [rank["pid"] for rank in pair.status()["ranks"]]
    going.write_bytes(vae.read_bytes()[:-1000])
    with pytest.raises(JobError, match=r"going\.safetensors"):
        pair.decode(random_latent(1, 32, 1, 1, 2), going)
    going.unlink()
    with pytest.raises(JobError, match=r"going\.safetensors"):
        pair.decode(random_latent(1, 32, 1, 1, 2), going)
    assert [rank["pid"] for rank in pair.status()["ranks"]] == pids


@settings(max_examples=300)
@given(st.one_of(st.text(), st.text(alphabet="cpudan:0123456789-, ", max_size=20)))
def test_any_device_string_is_parsed_or_refused(text):
    try:
        devices = parse_devices(text)
    except ValueError as error:
        assert "devices" in str(error)
    else:
        assert devices and len({device.split(":")[0] for device in devices}) == 1


def test_a_group_of_more_than_64_ranks_is_refused():
    with pytest.raises(ValueError, match="5000 ranks; a group can have at most 64"):
        RankGroup(["cpu"] * 5000)
