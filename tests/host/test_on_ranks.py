"""The path that all decode nodes share, on real ranks: previews, messages, and unusual latents and results."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from core_models import weights_of


@pytest.fixture(scope="module")
def nodes(pack):
    names = ("on_ranks", "groups", "progress")
    yield SimpleNamespace(**{name: importlib.import_module(f"hv15_pack.nodes.{name}") for name in names})
    importlib.import_module("hv15_pack.nodes.groups").stop_all()


@pytest.fixture
def shown(nodes, monkeypatch):
    """The previews and messages of a node, without a minimum interval between previews."""
    shown = SimpleNamespace(pictures=[], messages=[])

    class Bar:
        def __init__(self, *_, **__) -> None: ...

        def update_absolute(self, value, total, preview) -> None:
            if preview:
                shown.pictures.append(preview[1])

    monkeypatch.setattr(nodes.progress, "PREVIEW_SECONDS", 0)
    monkeypatch.setattr(nodes.progress.comfy.utils, "ProgressBar", Bar)
    monkeypatch.setattr(nodes.progress.Progress, "tell", lambda self, message: shown.messages.append(message))
    return shown


def decode(nodes, vae, latent, mode="seamless"):
    description = nodes.groups.GroupDescription("cpu,cpu")
    return nodes.on_ranks.decode_on_ranks(latent, vae, nodes.on_ranks.DecodeOptions(description, mode, 48, 16))


def latent(seed, frames=9):
    return torch.randn(1, 32, frames, 6, 8, generator=torch.Generator().manual_seed(seed))


def colours(pixels):
    return set(map(tuple, (pixels.clamp(0, 1) * 255).to(torch.uint8).reshape(-1, 3).tolist()))


def shades(picture):
    return set(map(tuple, np.asarray(picture).reshape(-1, 3).tolist()))


@pytest.mark.parametrize("mode", ["seamless", "tiled"])
def test_previews_show_what_was_written_in_this_decode_and_never_an_earlier_video(
    nodes, pack, core, shown, monkeypatch, mode
):
    vae = pack.load_vae(core.path)
    before, watch = [], nodes.progress.Progress.watch

    def spy(self, frames):
        before.append(frames.clone())
        watch(self, frames)

    monkeypatch.setattr(nodes.progress.Progress, "watch", spy)
    earlier = decode(nodes, vae, latent(1), mode).clone()
    shown.pictures.clear()
    frames = decode(nodes, vae, latent(2), mode)
    assert torch.equal(before[1], earlier), "the buffer was not reused"
    old = colours(earlier)
    allowed = colours(frames) | {(0, 0, 0)}
    assert shown.pictures and old - allowed
    for picture in shown.pictures:
        assert shades(picture) <= allowed


def test_a_reused_buffer_gives_no_preview_before_the_ranks_have_written(nodes, shown):
    used = torch.full((1, 17, 32, 48, 3), 0.7)
    progress = nodes.progress.Progress()
    progress.watch(used)
    progress.update(98, 100)
    assert not shown.pictures
    used[0, :12, :16] = 0.2
    progress.update(99, 100)
    (picture,) = shown.pictures
    assert shades(picture) == {(0, 0, 0), (51, 51, 51)}
    used[:] = 0.4
    progress.update(100, 100)
    assert shades(shown.pictures[-1]) == {(102, 102, 102)}


@pytest.mark.parametrize("shape", [(1, 1, 32, 48, 3), (2, 5, 16, 16, 3), (1, 121, 48, 80, 3)])
def test_at_most_eight_frames_are_marked_for_previews_and_at_least_one(nodes, shown, shape):
    frames = torch.zeros(shape)
    nodes.progress.Progress().watch(frames)
    marked = int(frames.isnan().flatten(2).any(2).sum())
    assert 1 <= marked <= nodes.progress.PREVIEW_FRAMES


def test_room_is_made_if_the_ranks_request_it(nodes, pack, core, shown, monkeypatch):
    vae, made = pack.load_vae(core.path), []
    monkeypatch.setattr(nodes.on_ranks, "make_room", made.append)
    decode(nodes, vae, latent(3, 2))
    assert made == []
    run = nodes.groups.RankGroup.run

    def request(group, job, make_room, **options):
        make_room()
        return run(group, job, **options)

    monkeypatch.setattr(nodes.groups.RankGroup, "run", request)
    decode(nodes, vae, latent(3, 2))
    assert made == [nodes.groups.live_group(nodes.groups.GroupDescription("cpu,cpu"))]


def test_an_fp8_latent_decodes_like_the_same_values_in_float32(nodes, pack, core, shown):
    vae, fp8 = pack.load_vae(core.path), latent(3, 2).to(torch.float8_e4m3fn)
    assert torch.equal(decode(nodes, vae, fp8), decode(nodes, vae, fp8.float()))


def test_pixels_that_are_nan_or_infinite_are_reported_on_the_node(nodes, pack, core, shown):
    decode(nodes, pack.load_vae(core.path), latent(3, 2))
    assert not shown.messages
    weights = weights_of(core.model)
    weights["decoder.conv_out.conv.bias"] = torch.full_like(weights["decoder.conv_out.conv.bias"], float("nan"))
    broken = core.path.with_name("broken.safetensors")
    save_file(weights, broken)
    assert decode(nodes, pack.load_vae(broken), latent(3, 2)).isnan().any()
    assert len(shown.messages) == 1 and "NaN or infinite" in shown.messages[0]
