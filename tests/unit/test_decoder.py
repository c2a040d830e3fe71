"""The streaming decoder on one device, compared with diffusers' decoder."""

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15

from benchmarks.random_weights import random_latent
from distributed.vae.block_borders import BlockBorders
from distributed.vae.hunyuanvideo15.decoder import Tail, Trunk, split
from distributed.vae.hunyuanvideo15.weights import Weights
from distributed.vae.interface import Steps
from distributed.vae.regions import Region, _reach, blocks, hull, whole

WIDTHS = (8, 8, 16, 32, 32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo15(block_out_channels=WIDTHS).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    return vae


def decoder_of(vae) -> dict:
    return {k.removeprefix("decoder."): v for k, v in vae.state_dict().items() if k.startswith("decoder.")}


@pytest.fixture(scope="module")
def weights(vae):
    return Weights(decoder_of(vae), CPU, torch.float32)


@torch.inference_mode()
def stream(weights, latent, steps):
    """Decode a latent [1, 32, T, H, W] to frames [T', H', W', 3]."""
    video = latent[0].permute(1, 2, 3, 0).to(weights.dtype).contiguous()
    trunk = Trunk(weights, *video.shape[1:3], video.shape[0])
    tail = Tail(weights, whole(*video.shape[1:3], weights.convs), steps)
    return torch.cat(list(tail.run(trunk.run(split(video, steps.trunk)))))


@torch.inference_mode()
def reference(vae, latent):
    return (vae.decode(latent).sample[0].permute(1, 2, 3, 0) + 1) / 2


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("time", [5, 8])
def test_frames_are_bitwise_equal_for_any_step_length(vae, time):
    weights = Weights(decoder_of(vae), CPU, torch.bfloat16)
    latent = random_latent(1, 32, time, 3, 4, seed=6)
    short, *longer = (stream(weights, latent, steps) for steps in (Steps(2, 4), Steps(8, 8), Steps(6, 12)))
    assert all(torch.equal(short, long) for long in longer)


@pytest.mark.parametrize(("trunk", "tail"), [(1, 4), (2, 2), (4, 6), (0, 4)])
def test_steps_that_would_split_a_group_of_frames_are_refused(trunk, tail):
    with pytest.raises(ValueError, match="multiple of 2 and tail one of 4"):
        Steps(trunk, tail)


def test_levels_below_the_full_frame_rate_use_longer_steps(vae, monkeypatch):
    weights, seen = Weights(decoder_of(vae), CPU, torch.float32), {}
    level = Tail._level

    def recorded(self, index, x):
        seen.setdefault(index, []).append(len(x))
        return level(self, index, x)

    monkeypatch.setattr(Tail, "_level", recorded)
    stream(weights, random_latent(1, 32, 9, 2, 2), Steps(8, 4))
    assert seen == {0: [1, 8], 1: [1, 8, 8], 2: [1] + [4] * 8, 3: [1] + [4] * 8, 4: [1] + [4] * 8}


STEPS = [Steps(2, 4), Steps(2, 8), Steps(4, 12), Steps(8, 4)]


@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 1, 1), (4, 1, 3), (5, 4, 5)], ids=str)
def test_any_chunk_size_equals_the_untiled_decode_of_diffusers(vae, weights, shape, steps):
    latent = random_latent(1, 32, *shape, seed=1)
    assert relative(stream(weights, latent, steps), reference(vae, latent)) < 1e-5


@torch.inference_mode()
def blocks_and_whole(weights, region, grid, size=(22, 25)):
    """Return the pixels of a region, decoded in blocks and cropped from the decoded whole picture."""
    video, steps = random_latent(1, 32, 4, *size, seed=5)[0].permute(1, 2, 3, 0), STEPS[0]
    inputs = torch.cat(list(Trunk(weights, *size, 4).run(split(video.contiguous(), steps.trunk))))
    exact = torch.cat(list(Tail(weights, whole(*size, weights.convs), steps).run(split(inputs, steps.trunk))))
    frames, borders = torch.full_like(exact, float("nan")), BlockBorders(*grid, CPU)
    for row, column, extents in blocks(region, *grid, *size, weights.convs):
        seen, shown = hull(extents[0]), extents[-1][-1]
        edges = borders.edges(row, column)
        tail = Tail(weights, extents, steps, edges)
        chunks = split(inputs[:, seen.top : seen.bottom, seen.left : seen.right].clone(), steps.trunk)
        place = frames[:, shown.top : shown.bottom, shown.left : shown.right]
        assert place.isnan().all()  # no pixel is computed twice
        place[:] = torch.cat(list(tail.run(chunks)))
        assert not any(border.kept for border in edges.earlier if border)  # all stored pieces were read
    assert borders.left is None and not any(borders.above)
    where = slice(None), slice(16 * region.top, 16 * region.bottom), slice(16 * region.left, 16 * region.right)
    return frames[where], exact[where]


def test_borders_are_stored_in_pageable_memory_if_pinning_fails(monkeypatch):
    empty = torch.empty

    def fail_to_pin(*size, pin_memory=False, **options):
        if pin_memory:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", fail_to_pin)
    borders, piece = BlockBorders(1, 2, CPU), torch.randn(3, 5, 2, 16)
    for _ in range(2):
        place = borders.allocate(piece)
        assert place.shape == piece.shape and place.dtype == piece.dtype and not place.is_pinned()


REGIONS = [Region(0, 1, 0, 1), Region(10, 13, 0, 3), Region(9, 12, 11, 14), Region(0, 22, 20, 21)]


@pytest.mark.parametrize("region", REGIONS, ids=str)
def test_a_region_decoded_alone_equals_its_part_of_the_whole_picture(weights, region):
    pixels, exact = blocks_and_whole(weights, region, (1, 1))
    assert (pixels - exact).abs().max() < 1e-5


GRIDS = [
    (Region(0, 22, 0, 25), (1, 2), (22, 25)),
    (Region(0, 21, 2, 25), (2, 1), (22, 25)),
    (Region(9, 10, 3, 31), (1, 3), (10, 40)),
    (Region(0, 28, 0, 27), (3, 3), (28, 27)),
]


@pytest.mark.parametrize(("region", "grid", "size"), GRIDS, ids=str)
def test_a_decode_in_blocks_equals_the_whole_picture(weights, region, grid, size):
    frames, exact = blocks_and_whole(weights, region, grid, size)
    assert (frames - exact).abs().max() < 1e-5


@pytest.mark.parametrize("step", ["start", "move"])
def test_dropping_the_border_exchange_between_blocks_exceeds_the_tolerance(weights, monkeypatch, step):
    monkeypatch.setattr(f"distributed.vae.block_borders.BlockEdges.{step}", lambda self, *_: self)
    frames, exact = blocks_and_whole(weights, *GRIDS[1])
    assert not (frames - exact).abs().max() < 1e-3


def test_a_region_without_its_receptive_field_exceeds_the_tolerance(weights, monkeypatch):
    monkeypatch.setattr("distributed.vae.regions._reach", lambda at, step, side, convs: _reach(at, 0, side, convs))
    pixels, exact = blocks_and_whole(weights, REGIONS[1], (1, 1))
    assert (pixels - exact).abs().max() > 1e-3


def test_a_long_video_has_the_same_accuracy_as_a_short_one(vae, weights):
    latent = random_latent(1, 32, 31, 2, 2, seed=2)
    assert relative(stream(weights, latent, STEPS[2]), reference(vae, latent)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_accurate_as_in_diffusers(vae, weights, dtype):
    latent = random_latent(1, 32, 4, 4, 4, seed=3)
    exact = reference(vae, latent)
    half = Weights(decoder_of(vae), CPU, dtype)
    ours = relative(stream(half, latent, STEPS[1]), exact)
    import copy

    theirs = relative(reference(copy.deepcopy(vae).to(dtype), latent.to(dtype)), exact)
    assert ours <= 1.05 * theirs


def test_widths_and_upsamplers_are_derived_from_the_shapes(weights):
    assert weights.widths == tuple(reversed(WIDTHS))
    assert [up.temporal for up in weights.upsamplers] == [True, True, False, False]
    assert weights.full_rate_level == 2 and weights.convs == (1, 7, 7, 7, 7)


def test_dropping_the_causal_cache_exceeds_the_tolerance(vae, weights):
    """Show that the comparison can fail: without the cache the error is far above the tolerance."""
    latent = random_latent(1, 32, 4, 3, 3, seed=4)
    uncached = torch.cat([stream(weights, latent[:, :, :2], STEPS[0]), stream(weights, latent[:, :, 2:], STEPS[0])])
    exact = reference(vae, latent)
    assert relative(uncached[-4:], exact[-4:]) > 1e-2
