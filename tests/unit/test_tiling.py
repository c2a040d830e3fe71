"""The grid, the assignment and the blend of a tiled decode, tested separately."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distributed.vae.tiling import SPATIAL, Tile, assign, blend, blend_width, tile_grid

sizes = st.integers(1, 70)
latent_tiles = st.integers(1, 20)


@st.composite
def grids(draw):
    side = draw(latent_tiles)
    overlap = draw(st.integers(0, side - 1))
    return tile_grid(draw(sizes), draw(sizes), side * SPATIAL, overlap * SPATIAL), side, overlap


@given(grids())
def test_the_kept_parts_of_tiles_cover_every_pixel_once(case):
    grid, _, _ = case
    height = max(tile.bottom for tile in grid.tiles) * SPATIAL
    width = max(tile.right for tile in grid.tiles) * SPATIAL
    covered = torch.zeros(height, width, dtype=torch.int32)
    for tile in grid.tiles:
        top, left = tile.top * SPATIAL, tile.left * SPATIAL
        covered[top : top + tile.height, left : left + tile.width] += 1
    assert (covered == 1).all()


@given(grids())
def test_the_kept_part_of_a_tile_is_within_the_tile(case):
    grid, side, _ = case
    for tile in grid.tiles:
        assert tile.height <= (tile.bottom - tile.top) * SPATIAL <= side * SPATIAL
        assert tile.width <= (tile.right - tile.left) * SPATIAL <= side * SPATIAL


@pytest.mark.parametrize(
    ("height", "width", "tiles"),
    [(30, 53, 15), (45, 80, 28), (16, 16, 1), (13, 16, 1), (13, 17, 4), (17, 5, 2), (12, 12, 1), (3, 2, 1)],
)
def test_the_default_grid_has_as_many_tiles_as_diffusers(height, width, tiles):
    assert len(tile_grid(height, width, 256, 64).tiles) == tiles


def test_the_last_tile_covers_the_remaining_positions():
    last = tile_grid(13, 20, 256, 64).tiles[-1]
    assert last == Tile(1, 1, 12, 13, 12, 20, 16, 128)


@pytest.mark.parametrize(
    ("tile_size", "overlap", "message"),
    [
        (250, 64, "tile_size is 250"),
        (0, 0, "tile_size is 0"),
        (256, 60, "overlap is 60"),
        (256, 256, "overlap is 256"),
        (64, -16, "overlap is -16"),
    ],
)
def test_tile_sizes_that_do_not_match_the_latent_grid_are_refused(tile_size, overlap, message):
    with pytest.raises(ValueError, match=message):
        tile_grid(30, 30, tile_size, overlap)


@given(grids(), st.integers(1, 9))
def test_no_rank_gets_more_than_the_lpt_bound(case, world_size):
    grid, _, _ = case
    owner = assign(grid, world_size)
    load = [sum(t.cost for t, rank in zip(grid.tiles, owner, strict=True) if rank == r) for r in range(world_size)]
    total, largest = sum(load), max(tile.cost for tile in grid.tiles)
    assert set(owner) <= set(range(world_size))
    assert max(load) * world_size <= total + largest * (world_size - 1)


def test_surplus_ranks_get_no_tile():
    assert assign(tile_grid(3, 3, 256, 64), 4) == (0,)


def test_blend_equals_diffusers_in_both_directions():
    from diffusers import AutoencoderKLHunyuanVideo15

    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(1, 3, 2, 48, 40, generator=generator) for _ in range(2))
    for dim, theirs in ((1, AutoencoderKLHunyuanVideo15.blend_v), (2, AutoencoderKLHunyuanVideo15.blend_h)):
        expected = theirs(None, before.clone(), after.clone(), 16)[0].permute(1, 2, 3, 0)
        tile = after[0].permute(1, 2, 3, 0).clone()
        edge = before[0].permute(1, 2, 3, 0)
        blend(edge.narrow(dim, edge.shape[dim] - 16, 16), tile, dim)
        torch.testing.assert_close(tile, expected, atol=1e-6, rtol=0)


def test_a_blend_starts_with_the_neighbours_line_and_changes_only_the_overlap():
    edge, tile = torch.zeros(1, 16, 8, 3), torch.ones(1, 32, 8, 3)
    blend(edge, tile, 1)
    assert (tile[:, 0] == 0).all() and (tile[:, 16:] == 1).all()
    assert (tile[:, 1:16].diff(dim=1) > 0).all()


def test_a_blend_is_never_wider_than_either_tile():
    assert [blend_width(*sizes, 64) for sizes in ((256, 16), (32, 256), (256, 256))] == [16, 32, 64]
