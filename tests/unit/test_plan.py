"""Requests, divisions of the picture, and plans within a memory limit."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.random_weights import FULL, TINY, decoder_tensors
from distributed.ops import attention
from distributed.ranks.devices import Device
from distributed.vae.hunyuanvideo15 import footprint
from distributed.vae.hunyuanvideo15.footprint import peak_bytes
from distributed.vae.hunyuanvideo15.weights import Weights
from distributed.vae.interface import Plan, Steps
from distributed.vae.job import DecodeRequest, check_request, frame_count
from distributed.vae.plan import _steps_to_try, choose_plan
from distributed.vae.regions import Region, blocks, divide, drift

JOB = DecodeRequest((1, 32, 3, 4, 5))


def test_a_request_survives_json():
    wire = json.loads(json.dumps(asdict(JOB)))
    assert DecodeRequest(**{**wire, "latent_shape": tuple(wire["latent_shape"])}) == JOB


def test_the_frame_count_follows_the_temporal_compression():
    assert JOB.frames_shape == (1, 9, 64, 80, 3)
    assert [frame_count(t) for t in (1, 2, 31)] == [1, 5, 121]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_shape": (1, 32, 4, 5)}, r"shape \[1, 32, 4, 5\]"),
        ({"latent_shape": (1, 32, 0, 4, 5)}, "empty dimension"),
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"mode": "tiled", "overlap": 256}, "overlap is 256"),
    ],
)
def test_an_invalid_request_is_refused_with_a_message(change, message):
    with pytest.raises(ValueError, match=message):
        check_request(replace(JOB, **change), 2)


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 12))
def test_regions_cover_the_picture_and_differ_by_at_most_one_row_and_column(height, width, ranks):
    division = divide(height, width, ranks)
    assert 1 <= division.size <= ranks
    covered = torch.zeros(height, width, dtype=torch.int32)
    regions = division.regions
    for region in regions:
        covered[region.top : region.bottom, region.left : region.right] += 1
    assert (covered == 1).all()
    for sides in ([r.height for r in regions], [r.width for r in regions]):
        assert max(sides) - min(sides) <= 1 and min(sides) >= 1


def test_two_ranks_get_equal_halves():
    division = divide(45, 80, 2)
    assert (division.rows, division.columns) == (1, 2)


def test_eight_ranks_form_a_grid():
    division = divide(45, 80, 8)
    assert division.size == 8
    assert max(region.height * region.width for region in division.regions) <= 460


CONVS = 1, 7, 7, 7, 7
"""Number of convolutions per level of the model's tail."""


@st.composite
def grids(draw):
    """Draw a picture and a grid of blocks: height, width, rows, columns."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return draw(st.integers(9 * rows, 60)), draw(st.integers(9 * columns, 60)), rows, columns


@given(grids())
def test_at_every_convolution_blocks_cover_the_picture_once(grid):
    height, width, rows, columns = grid
    extents = [extents for _, _, extents in blocks(Region(0, height, 0, width), rows, columns, height, width, CONVS)]
    for level in range(len(CONVS)):
        for regions in zip(*(block[level] for block in extents), strict=True):
            covered = torch.zeros(height * 2**level, width * 2**level, dtype=torch.int8)
            for region in regions:
                assert region.height > 0 and region.width > 0
                covered[region.top : region.bottom, region.left : region.right] += 1
            assert (covered == 1).all()


def test_a_region_reads_its_full_receptive_field():
    ((_, _, extents),) = blocks(Region(10, 20, 0, 40), 1, 1, 45, 80, CONVS)
    assert extents[0][0] == Region(10 - drift(CONVS), 20 + drift(CONVS), 0, 40 + drift(CONVS))
    assert extents[-1][-1] == Region(160, 320, 0, 640)


@pytest.fixture(scope="module")
def tiny():
    return Weights(decoder_tensors(TINY, torch.device("cpu")), torch.device("cpu"), torch.float32)


def test_less_memory_gives_shorter_steps_then_blocks_until_no_plan_fits(tiny):
    seen = []
    free = 2**40
    while True:
        plan, needed = choose_plan(tiny, (40, 50), (40, 50), 31, False, free)
        if plan is None:
            break
        assert needed <= free
        seen.append(plan)
        free = needed - 1
    assert needed > free and len(seen) > 5
    assert seen[0].blocks == (1, 1) and seen[1].steps.trunk <= seen[0].steps.trunk
    count = [plan.blocks[0] * plan.blocks[1] for plan in seen]
    first = next(i for i, blocks in enumerate(count) if blocks > 1)
    assert min(count[first:]) > 1 and count[-1] > 4  # no blocks while the whole region fits
    steps = [math.ceil(31 / plan.steps.trunk) + math.ceil(121 / plan.steps.tail) for plan in seen]
    passes = [n * each for n, each in zip(count, steps, strict=True)]
    assert passes[first:] == sorted(passes[first:])


def test_a_plan_leaves_memory_for_fragmentation_unless_it_is_the_smallest(tiny):
    size = (40, 50), (40, 50), 31, False
    first, needed = choose_plan(tiny, *size, 2**40)
    assert choose_plan(tiny, *size, int(needed / 0.94))[0] == first
    assert choose_plan(tiny, *size, int(needed / 0.96))[0] != first
    _, smallest = choose_plan(tiny, *size, 1)
    assert choose_plan(tiny, *size, smallest)[1] == smallest and choose_plan(tiny, *size, smallest - 1)[0] is None


@pytest.mark.parametrize(("time", "steps"), [(31, [8, 4, 2]), (4, [4, 2]), (1, [2])])
def test_step_lengths_are_powers_of_two_up_to_the_length_of_the_video(time, steps):
    assert _steps_to_try((30, 53), (1, 1), time) == steps


def test_a_picture_too_small_for_blocks_is_not_divided(tiny):
    plan, _ = choose_plan(tiny, (3, 3), (3, 3), 5, False, 2**40)
    nothing, smallest = choose_plan(tiny, (3, 3), (3, 3), 5, False, 1000)
    assert plan.blocks == (1, 1) and nothing is None and smallest > 1000


def test_peak_memory_grows_with_the_video_only_by_keys_and_values(tiny):
    plan, _ = choose_plan(tiny, (8, 8), (8, 8), 31, False, 2**40)
    short, long = (peak_bytes(tiny, (8, 8), (8, 8), time, False, plan) for time in (31, 62))
    assert long - short == 2 * 31 * 64 * TINY[0] * 4


@pytest.fixture(scope="module")
def full(full_size):
    """Return the full-size weights as if on a GPU. Planning only reads their shapes."""
    weights = full_size()
    weights.device = torch.device("cuda")
    return weights


@pytest.mark.parametrize(("device", "formed"), [("cuda", True), ("cpu", False), ("meta", False)])
def test_attention_scores_are_counted_on_devices_that_form_them(full_size, monkeypatch, device, formed):
    weights, size = full_size(), ((100, 200), (100, 200), 31, False)
    weights.device = torch.device(device)
    assert Device(weights.device).forms_attention_scores is formed
    few = peak_bytes(weights, *size, Plan(Steps(2, 4)))
    monkeypatch.setattr(attention, "SCORE_BYTES", 2**40)
    assert (peak_bytes(weights, *size, Plan(Steps(2, 4))) > few) is formed


@pytest.mark.parametrize(("picture", "gib"), [((45, 80), 10), ((45, 80), 6), ((68, 120), 16)])
def test_the_full_size_model_fits_the_documented_limits(full, picture, gib):
    plan, needed = choose_plan(full, picture, picture, 31, False, gib * 2**30)
    assert plan is not None and needed <= gib * 2**30


def test_a_picture_is_divided_along_its_longer_side(full):
    (wide, _), (high, _) = (choose_plan(full, size, size, 31, False, 10 * 2**30) for size in ((45, 80), (80, 45)))
    assert wide.blocks == high.blocks[::-1] and wide.blocks[0] == 1 < wide.blocks[1]


def test_the_flops_of_the_benchmark_are_those_of_the_model():
    from benchmarks.decode import conv_flops

    for size, expected in (((9, 30, 53), 338e12), ((31, 30, 53), 1230e12), ((31, 45, 80), 2785e12)):
        assert conv_flops(FULL, *size) == pytest.approx(expected, rel=0.01)


def test_a_single_frame_needs_less_memory_than_two_latent_frames(full):
    one, two = (choose_plan(full, (68, 120), (68, 120), time, False, 2**60)[1] for time in (1, 2))
    assert 19.1 * 2**30 <= one < 0.85 * two  # 19.1 GiB were allocated on an H100


@pytest.mark.parametrize(("device", "counted"), [("cuda", True), ("cpu", False)])
def test_finished_pixels_in_flight_to_the_host_are_counted(full_size, monkeypatch, device, counted):
    weights, size, plan = full_size(), ((68, 120), (68, 120), 31, False), Plan(Steps(2, 4))
    weights.device = torch.device(device)
    before = peak_bytes(weights, *size, plan)
    monkeypatch.setattr(footprint, "SLOTS", footprint.SLOTS + 4)
    piece = plan.steps.tail * (16 * 68 + 2) * (16 * 120 + 2) * 3 * 4
    assert peak_bytes(weights, *size, plan) - before == (4 * piece if counted else 0)
