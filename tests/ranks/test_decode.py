"""Decodes on real rank processes, compared with diffusers and with each other."""

import gc
import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15Decoder3D
from safetensors.torch import save_file

from benchmarks.random_weights import TINY, random_latent
from distributed import Cancelled, JobError, RankGroup
from distributed.ranks.devices import activate
from distributed.ranks.task import JobWatch
from distributed.vae.engine import Engine
from distributed.vae.hunyuanvideo15.weights import Weights
from distributed.vae.job import DecodeRequest
from distributed.vae.plan import choose_plan
from distributed.vae.regions import divide
from tests.ranks.moments import until


@pytest.fixture(scope="module")
def reference(weights):
    """Return a function that decodes a latent with diffusers, untiled or tiled, to frames in 0..1, with a cache."""
    vae = AutoencoderKLHunyuanVideo15(block_out_channels=(8, 16, 32, 64, 64)).eval()
    vae.decoder = HunyuanVideo15Decoder3D(32, 3, list(TINY), 2, 16, 4, True).eval()
    vae.decoder.load_state_dict({key.removeprefix("decoder."): value for key, value in weights.items()})
    vae.use_slicing = True  # diffusers 0.42.1 cannot decode a batch at once

    known = {}

    @torch.inference_mode()
    def decode(z, tile_size=None, overlap=None):
        key = z.numpy().tobytes(), tile_size, overlap
        if key in known:
            return known[key]
        vae.use_tiling = tile_size is not None
        if tile_size:
            vae.tile_sample_min_height = vae.tile_sample_min_width = tile_size
            vae.tile_latent_min_height = vae.tile_latent_min_width = tile_size // 16
            vae.tile_overlap_factor = overlap / tile_size
        return known.setdefault(key, ((vae.decode(z).sample.permute(0, 2, 3, 4, 1) + 1) / 2).clamp(0, 1))

    return decode


SEAMLESS = [(1, 32, 5, 5, 7), (1, 32, 2, 1, 3), (2, 32, 1, 2, 2), (1, 32, 1, 1, 1), (1, 32, 9, 2, 3)]
TILED = [
    ((1, 32, 3, 9, 6), 64, 16),
    ((1, 32, 2, 9, 6), 64, 48),
    ((1, 32, 2, 3, 2), 256, 64),
    ((2, 32, 2, 5, 5), 32, 0),
    ((1, 32, 1, 13, 5), 64, 32),
    ((1, 32, 2, 4, 4), 64, 16),
    ((1, 32, 2, 4, 5), 64, 16),
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_decodes_on_any_number_of_ranks_equal_those_of_diffusers(ranks, vae, reference, tiled_bits):
    with RankGroup(devices=["cpu"] * ranks) as group:
        for shape in SEAMLESS if ranks in (2, 6) else SEAMLESS[:2]:
            z = random_latent(*shape)
            error = (group.decode(z, vae, "seamless") - reference(z)).abs().max()
            assert error < 1e-5, (shape, error)
        for shape, tile_size, overlap in TILED:
            z = random_latent(*shape)
            frames = group.decode(z, vae, "tiled", tile_size=tile_size, overlap=overlap)
            error = (frames - reference(z, tile_size, overlap)).abs().max()
            assert error < 1e-5, (shape, error)
            assert torch.equal(frames, tiled_bits[shape, tile_size, overlap]), f"{ranks} ranks give other bits"


@pytest.fixture(scope="module")
def tiled_bits(weights) -> dict:
    """The frames of each tiled case, decoded in this process on one rank."""
    threads = torch.get_num_threads()
    device = activate("cpu", 1)
    engine = Engine({key.removeprefix("decoder."): value for key, value in weights.items()}, device, torch.float32)
    found = {}
    for shape, tile_size, overlap in TILED:
        request = DecodeRequest(shape, "tiled", tile_size, overlap)
        found[shape, tile_size, overlap] = frames = torch.empty(request.frames_shape)
        engine.decode(request, random_latent(*shape), frames, JobWatch())
    torch.set_num_threads(threads)
    return found


def scarce(weights, shape: tuple[int, ...], ranks: int) -> int:
    """Return the largest memory limit in bytes with which this latent is decoded in blocks."""
    tensors = {key.removeprefix("decoder."): value for key, value in weights.items()}
    loaded = Weights(tensors, torch.device("cpu"), torch.float32)
    division = divide(*shape[3:], ranks)
    part = division.largest.height, division.largest.width
    free = 2**40
    while True:
        plan, needed = choose_plan(loaded, part, shape[3:], shape[2], division.size > 1, free)
        if plan.in_blocks:
            return needed
        free = needed - 1


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_picture_that_exceeds_the_memory_limit_is_decoded_in_blocks(ranks, vae, weights, reference):
    shape = (1, 32, 3, 18, 18)
    z = random_latent(*shape)
    with RankGroup(devices=["cpu"] * ranks) as group:
        budget = scarce(weights, shape, ranks)
        frames = group.decode(z, vae, memory=budget)
        assert (frames - reference(z)).abs().max() < 1e-5
        reports = []
        long = (1, 32, 12, 18, 18)
        with pytest.raises(Cancelled):
            group.decode(
                random_latent(*long),
                vae,
                memory=scarce(weights, long, ranks),
                cancelled=lambda: bool(reports),
                progress=lambda done, total: done and reports.append(1),
            )
        pids = [rank["pid"] for rank in group.status()["ranks"]]
        assert (group.decode(z, vae, memory=budget) - reference(z)).abs().max() < 1e-5
        assert pids == [rank["pid"] for rank in group.status()["ranks"]]


def test_a_rank_without_a_region_takes_part_in_decodes_in_blocks_and_their_cancellation(vae, weights, reference):
    shape, ranks = (1, 32, 2, 36, 36), 7
    assert divide(*shape[3:], ranks).size == 6
    z, budget = random_latent(*shape), scarce(weights, shape, ranks)
    with RankGroup(devices=["cpu"] * ranks) as group:
        assert (group.decode(z, vae, memory=budget) - reference(z)).abs().max() < 1e-5
        pids = [rank["pid"] for rank in group.status()["ranks"]]
        reports = []
        with pytest.raises(Cancelled):
            group.decode(
                z,
                vae,
                memory=budget,
                cancelled=lambda: bool(reports),
                progress=lambda done, total: done and reports.append(1),
            )
        assert group.decode(random_latent(1, 32, 1, 1, 2), vae).isfinite().all()
        assert pids == [rank["pid"] for rank in group.status()["ranks"]]


def test_the_error_is_not_larger_along_the_border_between_ranks(pair, vae, reference):
    z = random_latent(1, 32, 3, 4, 8)
    error = (pair.decode(z, vae) - reference(z)).abs().amax(dim=(0, 1, 2, 4))
    assert error[56:72].max() <= 4 * torch.cat([error[:56], error[72:]]).max() and error.max() < 1e-5


def test_a_decode_without_the_exchange_of_borders_would_exceed_the_tolerance(pair, vae, reference):
    """Halves that are decoded separately differ from the reference by far more than the tolerance."""
    z = random_latent(1, 32, 2, 3, 8)
    halves = torch.cat([pair.decode(half.contiguous(), vae) for half in z.split(4, dim=4)], dim=3)
    assert (halves - reference(z)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64], ids=str)
def test_a_latent_of_any_floating_point_dtype_is_accepted(pair, vae, dtype):
    z = random_latent(1, 32, 1, 1, 2).to(dtype)
    assert torch.equal(pair.decode(z, vae), pair.decode(z.float(), vae))


def test_processes_are_kept_between_decodes(pair, vae):
    before = [rank["pid"] for rank in pair.status()["ranks"]]
    first = pair.decode(random_latent(1, 32, 2, 2, 3), vae)
    again = pair.decode(random_latent(1, 32, 2, 2, 3), vae)
    assert torch.equal(first, again)
    assert [rank["pid"] for rank in pair.status()["ranks"]] == before


def mapped(pid: int, part: str) -> set[str]:
    """Return the paths of the files that a process maps, if they contain `part`."""
    return {file.path for file in psutil.Process(pid).memory_maps() if part in file.path}


def weights_in_memory(pid: int) -> set[str]:
    """Return the inodes of the weights that exist only in memory and that a process maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:hv15-vae" in line}


def maps(pid: int, path: Path) -> bool:
    return str(path) in mapped(pid, str(path))


def test_a_checkpoint_is_preloaded_and_errors_are_reported_by_the_decode(vae, tmp_path):
    with RankGroup(["cpu", "cpu"]) as group:
        group.preload(tmp_path / "missing.safetensors")
        group.preload(vae)
        limit = time.monotonic() + 60
        while not all(maps(rank["pid"], vae) for rank in group.status()["ranks"]):
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert group.decode(random_latent(1, 32, 1, 1, 2), vae).isfinite().all()
        with pytest.raises(JobError, match="missing"):
            group.decode(random_latent(1, 32, 1, 1, 2), tmp_path / "missing.safetensors")


def test_a_checkpoint_is_preloaded_again_after_a_decode_with_another_one(pair, vae, tmp_path):
    other = tmp_path / "other.safetensors"
    shutil.copy(vae, other)

    def hold(path: Path) -> bool:
        return all(maps(rank["pid"], path) for rank in pair.status()["ranks"])

    pair.preload(vae)
    assert until(lambda: hold(vae), 60)
    pair.decode(random_latent(1, 32, 1, 1, 2), other)
    assert hold(other)
    pair.preload(vae)
    assert until(lambda: hold(vae), 60)


def test_release_ends_a_preload(vae):
    with RankGroup(["cpu"]) as group:
        group.start(wait=True)
        with group._turns:  # so that the preload waits for its turn
            group.preload(vae)
            releasing = threading.Thread(target=group.release)
            releasing.start()
            assert until(lambda: not any(thread.name == "hv15-preload" for thread in threading.enumerate()), 10)
        releasing.join()
        assert not maps(group.status()["ranks"][0]["pid"], vae)


def test_release_frees_the_weights_at_once_and_keeps_the_processes(pair, vae):
    pids = [rank["pid"] for rank in pair.status()["ranks"]]
    expected = pair.decode(random_latent(1, 32, 1, 1, 2), vae).clone()
    assert all(maps(pid, vae) for pid in pids)
    pair.release()
    assert not any(maps(pid, vae) for pid in pids)
    assert torch.equal(pair.decode(random_latent(1, 32, 1, 1, 2), vae), expected)
    assert [rank["pid"] for rank in pair.status()["ranks"]] == pids


def test_weights_are_not_preloaded_to_a_shared_device(vae):
    with RankGroup(["cpu"]) as group:
        states = []
        group.on_change = lambda: states.append(group.status()["state"])
        group.preload(vae, shared=["cpu"])
        limit = time.monotonic() + 60
        while "busy" not in states or states[-1] != "ready":
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert not maps(group.status()["ranks"][0]["pid"], vae)


def test_a_state_dict_is_copied_to_shared_memory_once(pair, vae, weights):
    z = random_latent(1, 32, 2, 2, 3)
    assert torch.equal(pair.decode(z, weights), pair.decode(z, vae))
    shared = pair._weights.path
    pair.decode(z, dict(weights))
    assert pair._weights.path == shared and shared.stat().st_mode & 0o077 == 0


def test_another_vae_replaces_the_previous_one(pair, vae, weights, tmp_path):
    """This holds for checkpoints on disk and in memory. The ranks map only the one that they decode with."""
    z = random_latent(1, 32, 1, 1, 2)
    pids = [rank["pid"] for rank in pair.status()["ranks"]]
    expected = pair.decode(z, vae).clone()
    others = [{key: factor * tensor for key, tensor in weights.items()} for factor in (0.5, 0.25)]
    on_disk = tmp_path / "other.safetensors"
    save_file(others[0], on_disk)
    frames = pair.decode(z, on_disk)
    assert not torch.equal(frames, expected)
    assert all(maps(pid, on_disk) and not maps(pid, vae) for pid in pids)
    assert torch.equal(pair.decode(z, others[0]), frames)
    shared = [weights_in_memory(pid) for pid in pids]
    assert shared[0] == shared[1] and len(shared[0]) == 1 and not any(maps(pid, on_disk) for pid in pids)
    pair.decode(z, others[1])
    again = [weights_in_memory(pid) for pid in pids]
    assert again[0] == again[1] and len(again[0]) == 1 and again != shared
    assert torch.equal(pair.decode(z, vae), expected)
    assert not any(weights_in_memory(pid) for pid in pids)
    assert [rank["pid"] for rank in pair.status()["ranks"]] == pids


def test_frames_are_shared_memory_that_is_reused_when_no_tensor_refers_to_it(pair, vae):
    z = random_latent(1, 32, 2, 2, 3)
    frames = pair.decode(z, vae)
    view, place = frames[0, 1:], frames.data_ptr()
    expected = view.clone()
    other = pair.decode(random_latent(1, 32, 2, 2, 3, seed=9), vae)
    assert other.data_ptr() != place and torch.equal(view, expected)
    assert pair._buffers.lent == 2
    del frames, view, other
    gc.collect()
    assert pair._buffers.lent == 0
    pair.release()
    assert torch.equal(pair.decode(z, vae)[0, 1:], expected)


def test_progress_is_reported_and_ends_at_the_total(pair, vae):
    def total_of(videos: int) -> int:
        reports = []
        latent = random_latent(videos, 32, 24, 4, 4)
        pair.decode(latent, vae, progress=lambda done, total: reports.append((done, total)))
        assert reports[-1][0] == reports[-1][1] > 0
        fractions = [done / total for done, total in reports if total]
        assert fractions == sorted(fractions)
        return reports[-1][1]

    assert total_of(2) == 2 * total_of(1), "a batch is one decode"


@pytest.mark.parametrize(
    ("z", "options", "message"),
    [
        (torch.zeros(1, 16, 2, 2, 2), {}, "16 channels; the VAE decodes 32"),
        (torch.zeros(1, 32, 2, 2), {}, "shape"),
        (torch.full((1, 32, 1, 1, 1), float("inf")), {}, "32 of 32 latent values are NaN or infinite"),
        (torch.zeros(1, 32, 1, 1, 1, dtype=torch.int32), {}, "int32"),
        (torch.zeros(1, 32, 1, 1, 1), {"mode": "quick"}, "mode is 'quick'"),
        (torch.zeros(1, 32, 1, 1, 1), {"mode": "tiled", "tile_size": 100}, "tile_size is 100"),
        (torch.zeros(1, 32, 1, 1, 1), {"memory": 1000}, "GiB"),
    ],
)
def test_invalid_input_is_refused_and_the_ranks_keep_running(pair, vae, z, options, message):
    pids = [rank["pid"] for rank in pair.status()["ranks"]]
    with pytest.raises(JobError, match=message):
        pair.decode(z, vae, **options)
    assert pair.decode(random_latent(1, 32, 1, 1, 2), vae).shape == (1, 1, 16, 32, 3)
    assert [rank["pid"] for rank in pair.status()["ranks"]] == pids


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x80\x04\x95pickle" * 100])
def test_a_file_that_is_not_a_checkpoint_is_refused_and_the_ranks_keep_running(pair, vae, tmp_path, content):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    with pytest.raises(JobError, match=r"bad\.safetensors"):
        pair.decode(random_latent(1, 32, 1, 1, 1), bad)
    assert pair.decode(random_latent(1, 32, 1, 1, 2), vae).shape == (1, 1, 16, 32, 3)
