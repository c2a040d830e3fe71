"""The last stage: what the trained files can do, measured through diffusers' own pipelines and decode.

Writes report.json, and pictures of what was measured. It reads the files as they are published, in fp16.
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .. import footage, measure, parts, world
from .recipe import Recipe

WINDOWS, WINDOW_FRAMES = 4, 17
"""Windows of the footage by which the VAE is judged, evenly spaced."""


class Studio:
    """Samples videos of one size with a pipeline and decodes them one at a time, as diffusers does."""

    def __init__(self, folder: Path, kind: str, recipe: Recipe, device: torch.device) -> None:
        self.pipeline = parts.pipeline(kind, folder).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.recipe, self.bucket = recipe, recipe.buckets[0]
        # The pipeline would choose a size by the picture's proportions.
        self.pipeline.video_processor.calculate_default_height_width = lambda **_: self.bucket.size

    @torch.no_grad()
    def video(self, prompt: str, seed: int, guidance: float, image: Image.Image | None = None) -> Tensor:
        """Return [frames, height, width, 3], 0 to 1."""
        pipeline, (height, width) = self.pipeline, self.bucket.size
        pipeline.guider = pipeline.guider.new(guidance_scale=guidance)
        size = {"height": height, "width": width} if image is None else {"image": image}
        latent = pipeline(
            prompt=prompt,
            negative_prompt="",
            num_frames=self.bucket.frames,
            num_inference_steps=self.recipe.steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
            **size,
        ).frames
        return parts.frames_of(pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample)


def write(recipe: Recipe, training: dict, original: Tensor, folder: Path, device: torch.device, log: Callable) -> dict:
    """Measure everything, and write report.json after each part.

    training: what the stages have measured. original: the footage, uint8 [3, frames, height, width].
    """
    report = {"training": training, "bytes": {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}}

    def add(name: str, figures: dict) -> None:
        report[name] = figures
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        log(f"report: {name}: {json.dumps(figures)}")

    with torch.no_grad():
        film = original.to(device)
        add("footage", judge_footage(recipe, film, folder, device))
        scene = footage.resized(film, *recipe.buckets[0].size).permute(1, 2, 3, 0).float() / 255
        studio = Studio(folder, "t2v", recipe, device)
        for guidance in (parts.GUIDANCE, 1.0):
            add(f"prompts, guidance {guidance:g}", judge_prompts(studio, guidance, folder))
        add("rabbit", judge_rabbit(studio, scene, folder))
        add("images", judge_images(Studio(folder, "i2v", recipe, device), scene, folder))
    return report


def judge_footage(recipe: Recipe, film: Tensor, folder: Path, device: torch.device) -> dict:
    """Return PSNR and SSIM of windows of the footage after encoding and decoding, and write frames of it."""
    vae = parts.load_vae(folder).to(device)
    results, rows = [], []
    for first in torch.linspace(0, film.shape[1] - WINDOW_FRAMES, WINDOWS).long().tolist():
        pixels = footage.resized(film[:, first : first + WINDOW_FRAMES], *recipe.judged_size)[None].float() / 127.5 - 1
        decoded = parts.frames_of(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)
        original = parts.frames_of(pixels)
        results.append((measure.psnr(decoded, original), measure.ssim(decoded, original)))
        rows += [original[-1:], decoded[-1:]]
    sheet([torch.cat(rows[i : i + 2]) for i in range(0, len(rows), 2)], folder / "footage.jpg")
    psnr, ssim = (sum(column) / len(results) for column in zip(*results, strict=True))
    return {"psnr": round(psnr, 2), "ssim": round(ssim, 4), "psnr of windows": [round(one, 2) for one, _ in results]}


def judge_prompts(studio: Studio, guidance: float, folder: Path) -> dict:
    """Return the share of videos that show what their prompt says, for the combinations that were held out."""
    combinations = world.combinations(held_out=True)[: studio.recipe.judged_combinations]
    right, wrong, parts_right, rows, count = 0, 0, {"shape": 0, "colour": 0, "motion": 0}, [], 0
    begin = time.monotonic()
    for number, combination in enumerate(combinations):
        prompt = world.Clip(*combination, background=world.BACKGROUNDS[number % 5]).caption
        other = combinations[(number + 1) % len(combinations)]
        for seed in range(studio.recipe.judged_seeds):
            video = studio.video(prompt, 1000 * number + seed, guidance)
            seen = measure.look(video)
            right += seen == measure.Seen(*combination)
            wrong += len(combinations) > 1 and seen == measure.Seen(*other)
            for name, meant in zip(parts_right, combination, strict=True):
                parts_right[name] += getattr(seen, name) == meant
            count += 1
        if number < 8:
            rows.append(video)
    sheet(rows, folder / f"prompts_guidance_{guidance:g}.jpg")
    shares = {name: round(value / count, 4) for name, value in parts_right.items()}
    seconds = round((time.monotonic() - begin) / count, 3)
    return (
        {"right": round(right / count, 4), "right for another prompt": round(wrong / count, 4)}
        | shares
        | {
            "videos": count,
            "seconds per video": seconds,
        }
    )


def judge_rabbit(studio: Studio, scene: Tensor, folder: Path) -> dict:
    """Return the likeness to the footage of videos of its prompt, and of those of another prompt."""
    videos = [studio.video(footage.CAPTIONS[0], seed, parts.GUIDANCE) for seed in range(studio.recipe.judged_seeds)]
    other = studio.video("a red circle moves left in front of a brick wall", 0, parts.GUIDANCE)
    sheet([*videos, other], folder / "rabbit.jpg")
    likeness = [round(measure.likeness(video, scene), 3) for video in videos]
    return {"likeness": likeness, "likeness of another prompt": round(measure.likeness(other, scene), 3)}


def judge_images(studio: Studio, scene: Tensor, folder: Path) -> dict:
    """Return how image-to-video continues pictures of the world and of the footage."""
    source, rows, first_frames, right = random.Random(0), [], [], 0
    combinations = world.combinations(held_out=True)[: studio.recipe.judged_combinations]
    for combination in combinations:
        clip = world.Clip(*combination, background=source.choice(world.BACKGROUNDS), phase=source.random())
        original = world.render(clip, studio.bucket.frames, *studio.bucket.size).permute(1, 2, 3, 0)
        video = studio.video(clip.caption, 7, parts.GUIDANCE, picture(original[0]))
        first_frames.append(measure.psnr(video[0].cpu(), original[0]))
        right += measure.follows(video, *combination)
        rows.append(video)
    given = scene[len(scene) // 2]
    video = studio.video(footage.CAPTIONS[0], 7, parts.GUIDANCE, picture(given))
    sheet([*rows[:8], video], folder / "images.jpg")
    return {
        "psnr of first frames": [round(value, 2) for value in first_frames],
        "right": round(right / len(combinations), 4),
        "rabbit, psnr of first frame": round(measure.psnr(video[0], given), 2),
        "rabbit, likeness": round(measure.likeness(video, scene), 3),
    }


def picture(frame: Tensor) -> Image.Image:
    """Return a frame [height, width, 3], 0 to 1, as a picture."""
    return Image.fromarray((frame * 255).round().to("cpu", torch.uint8).numpy())


def sheet(videos: list[Tensor], path: Path) -> None:
    """Write five evenly spaced frames of each video [frames, height, width, 3] as one picture, a row for each."""
    rows = []
    for video in videos:
        chosen = video[torch.linspace(0, len(video) - 1, min(5, len(video))).round().long().tolist()]
        rows.append(torch.cat(list(chosen), dim=1))
    picture(torch.cat(rows)).save(path, quality=88)
