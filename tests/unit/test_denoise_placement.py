"""Which weights stay on the device: a pure function of sizes and of free memory."""

import math

import pytest
import torch

from distributed.denoise.layout import Architecture
from distributed.denoise.parallel import plan
from distributed.denoise.placement import SLOTS, Placement, Sizes, sizes_of

GIB = 2**30
SIZES = Sizes(computation=1000, fixed=50, modulation=540, block=20, blocks=54)


def real_sizes(shape: tuple[int, int, int], ranks: int = 1) -> Sizes:
    """Return the sizes of a step with the real transformer in bfloat16. shape: of the latent."""
    architecture = Architecture()
    layout = plan(ranks, 1, math.prod(shape), architecture.heads, architecture.head_dim)
    return sizes_of(architecture, torch.bfloat16, layout)


def test_the_fastest_placement_that_fits_is_chosen():
    everything = SIZES.needed(SIZES.fastest)
    assert everything == 1000 + 50 + 540 + 54 * 20
    assert SIZES.choose(everything) == Placement(True, 54, 54)
    assert SIZES.choose(everything - 1) == SIZES.choose(everything - 540) == Placement(False, 54, 54)
    assert SIZES.choose(everything - 541).resident == 54 - SLOTS - 1
    assert SIZES.choose(1000 + 50 + SLOTS * 20) == SIZES.choose(0) == Placement(False, 0, 54)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 54])
def test_a_placement_fits_with_as_many_blocks_on_the_device_as_possible(blocks):
    sizes = SIZES._replace(blocks=blocks)
    before = Placement(False, 0, blocks)
    for free in range(sizes.needed(before), sizes.needed(sizes.fastest) + 1):
        chosen = sizes.choose(free)
        assert sizes.needed(chosen) <= free and chosen >= before
        if chosen.streamed:
            assert sizes.needed(chosen._replace(resident=chosen.resident + 1)) > free or chosen.resident + 1 == blocks
        before = chosen
    assert before == sizes.fastest


def test_streamed_blocks_are_spread_evenly_and_come_last():
    for resident in range(55):
        placement = Placement(False, resident, 54)
        streamed = placement.streamed
        assert len(streamed) == 54 - resident and placement.slots == min(SLOTS, len(streamed))
        gaps = {after - before for before, after in zip((-1, *streamed), streamed, strict=False)}
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert not streamed or streamed[-1] == 53
    assert Placement(False, 3, 6).streamed == (1, 3, 5)


def test_a_step_at_720x1280x121_fits_in_16_gib_with_all_blocks_and_in_8_gib_with_some():
    sizes = real_sizes((31, 45, 80))
    assert sizes.block == pytest.approx(201e6, rel=0.01) and sizes.blocks == 54
    assert sizes.needed(sizes.fastest) > 16 * GIB
    assert sizes.choose(16 * GIB) == Placement(False, 54, 54)
    assert 15 <= sizes.choose(8 * GIB).resident <= 25
    assert sizes.needed(Placement(False, 0, 54)) < 4.5 * GIB


def test_more_ranks_leave_room_for_more_blocks():
    resident = [real_sizes((31, 45, 80), ranks).choose(8 * GIB).resident for ranks in (1, 2, 4, 8)]
    assert resident == sorted(resident) and resident[0] < resident[-1] < 54
