"""The built-in miniature: complete, the same on every machine, and its videos show what it has learnt."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline, HunyuanVideo15Pipeline
from safetensors.torch import load_file

from miniature import footage, measure, parts, world
from miniature.folder import ensure_folder

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {"t2v": HunyuanVideo15Pipeline, "i2v": HunyuanVideo15ImageToVideoPipeline}
SIZE = (160, 256)
"""Height and width of the example prompts, which have 17 frames and 8 steps."""
HELD_OUT = world.combinations(held_out=True)


def digest(folder: Path) -> str:
    """Return a hash of the pipeline's weights and their names."""
    hashed = hashlib.sha256()
    for file in sorted(folder.glob("*/*.safetensors")):
        weights = {name.removeprefix("vision_model."): weight for name, weight in load_file(file).items()}
        for name, weight in sorted(weights.items()):
            hashed.update(f"{file.parent.name}.{name}".encode() + weight.numpy().tobytes())
    return hashed.hexdigest()[:16]


@pytest.fixture(scope="module")
def film() -> torch.Tensor:
    """The footage at the size of the example prompts, [frames, height, width, 3], from 0 to 1."""
    return footage.resized(footage.read(footage.find()), *SIZE).permute(1, 2, 3, 0).float() / 255


@pytest.fixture(scope="module")
def sampled(pack, tiny_folders):
    """A function that samples and decodes a video as the nodes do."""
    vae = parts.load_vae()
    loaded = {kind: pack.loading.load_pipeline(folder, torch.float32, "model") for kind, folder in tiny_folders.items()}

    def sample(prompt: str, seed: int, image: torch.Tensor | None = None, guidance: float = 6.0) -> torch.Tensor:
        """Return frames [frames, height, width, 3], from 0 to 1."""
        pipeline = loaded["t2v" if image is None else "i2v"]
        options = {"height": SIZE[0], "width": SIZE[1], "frames": 17, "steps": 8, "guidance": guidance, "shift": 5.0}
        latent = pack.sampling.sample(
            pipeline, pack.text.encode(pipeline, prompt, ""), **options, seed=seed, start_image=image
        )
        with torch.no_grad():
            return parts.frames_of(vae.decode(latent).sample)

    return sample


@pytest.mark.parametrize(("kind", "expected"), [("t2v", "abf3d0b095cabbd4"), ("i2v", "25571c77ff47b4b9")])
def test_the_weights_are_the_same_on_every_machine(tiny_folders, kind, expected):
    assert digest(tiny_folders[kind]) == expected


@pytest.mark.parametrize("kind", CLASSES)
def test_diffusers_loads_it_with_every_component(tiny_folders, kind):
    pipeline = CLASSES[kind].from_pretrained(tiny_folders[kind], local_files_only=True)
    assert all(part is not None for part in pipeline.components.values())
    vae = pipeline.vae
    assert (vae.config.latent_channels, vae.spatial_compression_ratio, vae.temporal_compression_ratio) == (32, 16, 4)


def test_the_prompt_changes_the_embeddings_and_quoted_text_is_encoded_by_byt5(tiny_folders):
    pipeline = HunyuanVideo15Pipeline.from_pretrained(tiny_folders["t2v"], local_files_only=True)

    def encode(prompt: str) -> tuple:
        with torch.no_grad():
            return pipeline.encode_prompt(prompt=prompt, device="cpu", dtype=torch.float32)

    (fox, mask, _, glyph_mask), (cat, *_), (_, _, glyphs, sign_mask) = map(
        encode, ("a red fox", "a red cat", 'a sign "stop"')
    )
    assert mask.sum() > 5 and (fox - cat)[:, :5].abs().max() > 0.1
    assert glyph_mask.sum() == 0 and sign_mask.sum() > 4 and glyphs.std() > 0


def test_the_files_have_at_most_12_megabytes():
    assert sum(file.stat().st_size for file in parts.WEIGHTS.iterdir()) < 12e6


def test_whole_frames_of_the_footage_are_encoded_and_decoded_with_26_decibels():
    vae = parts.load_vae()
    pixels = footage.resized(footage.read(footage.find())[:, 60:65], 480, 848)[None].float() / 127.5 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    assert measure.psnr(parts.frames_of(decoded), parts.frames_of(pixels)) > 26


def test_the_rabbits_prompt_gives_its_scene_and_another_prompt_does_not(sampled, film):
    assert measure.likeness(sampled(footage.CAPTIONS[0], 1), film) > 0.9
    assert measure.likeness(sampled("a red circle moves left in front of a brick wall", 1), film) < 0.4


def share_right(sample: Callable, guidance: float, every: int) -> float:
    """Return the share of videos that show what their held-out prompt says.

    No video may show what the previous prompt says. Of the held-out prompts, every `every`-th is sampled once.
    `make soak` samples all of them with three seeds.
    """
    chosen, seeds = (HELD_OUT, 3) if os.environ.get("HV15_SOAK") else (HELD_OUT[::every], 1)
    right = []
    for number, combination in enumerate(chosen):
        prompt = world.Clip(*combination, background=world.BACKGROUNDS[number % 5]).caption
        for seed in range(seeds):
            seen = measure.look(sample(prompt, seed, guidance=guidance))
            right.append(seen == measure.Seen(*combination))
            assert seen != measure.Seen(*chosen[number - 1])
    return sum(right) / len(right)


def test_nine_of_ten_videos_show_the_shape_the_colour_and_the_motion_of_held_out_prompts(sampled):
    assert share_right(sampled, 6.0, every=3) >= 0.9


def test_guidance_of_one_shows_them_less_often(sampled):
    assert share_right(sampled, 1.0, every=6) < 0.7


def test_image_to_video_starts_with_the_picture_and_moves_its_shape(sampled):
    clip = world.Clip("square", "blue", "right", background="brick wall")  # held out of training
    first = world.render(clip, 17, *SIZE).permute(1, 2, 3, 0)[:1]
    video = sampled(clip.caption, 1, first)
    assert measure.psnr(video[:1], first) > 24
    assert measure.follows(video, "square", "blue", "right") and not measure.follows(video, "square", "blue", "left")


def test_processes_that_create_it_at_the_same_time_leave_one_complete_folder(tmp_path, tiny_folders):
    code = (
        "import sys; from pathlib import Path; from miniature.folder import ensure_folder;"
        "print(ensure_folder('t2v', Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    results = [(*process.communicate(timeout=240), process.returncode) for process in processes]
    assert all(code == 0 for *_, code in results), results
    (folder,) = tmp_path.iterdir()
    assert {out.strip().splitlines()[-1] for out, *_ in results} == {str(folder)}
    assert digest(folder) == digest(tiny_folders["t2v"])


def test_a_failure_leaves_nothing_behind(monkeypatch, tmp_path):
    def fail(kind: str):
        raise RuntimeError("no")

    monkeypatch.setattr(parts, "pipeline", fail)
    with pytest.raises(RuntimeError):
        ensure_folder("t2v", tmp_path)
    assert list(tmp_path.iterdir()) == []
