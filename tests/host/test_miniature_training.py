"""The miniature's training: all stages with minute sizes, from footage to a report."""

import dataclasses
import json
import random

import av
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from torch import nn

from miniature import footage, measure, parts, text, world
from miniature.training import latents, report, train, train_transformer, train_vae
from miniature.training.forms import set_key_masks, velocity
from miniature.training.recipe import CHECK, Bucket, Crops

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A video file in place of the footage: 20 frames of 96x60, smooth and moving."""
    path = tmp_path_factory.mktemp("footage") / "clip.mp4"
    coarse = torch.rand(1, 3, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse, size=(20, 60, 96), mode="trilinear", align_corners=False)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 60, "yuv420p"
        for frame in (smooth[0] * 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def film(clip):
    return footage.read(clip)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    """The files of all stages."""
    folder = tmp_path_factory.mktemp("miniature")
    train.main(["--output", str(folder), "--footage", str(clip), "--check"])
    return folder


def test_all_stages_write_their_files_and_a_report(folder):
    names = {path.name for path in folder.iterdir()}
    assert {*train.FILES.values(), parts.SETTINGS_FILE, "training.json", "log.txt", "footage.jpg"} <= names
    found = json.loads((folder / "report.json").read_text())
    assert found["training"]["vae"]["steps"] == found["training"]["transformer"]["steps"] == 2
    assert {"footage", "prompts, guidance 6", "prompts, guidance 1", "rabbit", "images"} <= set(found)
    assert 0 < found["footage"]["psnr"] < 40 and found["prompts, guidance 6"]["videos"] == 2
    log = (folder / "log.txt").read_text()
    assert "2 steps, loss" in log and "PSNR" in log and "Whole frames of 80x48" in log


def test_a_stage_whose_file_exists_is_skipped(folder, film):
    before = (folder / parts.VAE_FILE).stat().st_mtime_ns
    train.run("vae", CHECK, 600, film, folder, CPU)
    assert (folder / parts.VAE_FILE).stat().st_mtime_ns == before
    assert "vae: vae.safetensors exists" in (folder / "log.txt").read_text()


def test_training_changed_the_weights_and_the_factor_gives_latents_a_spread_of_one(folder, film):
    torch.manual_seed(CHECK.seed)
    fresh, trained = parts.new_vae(**CHECK.vae), parts.load_vae(folder)
    assert (fresh.decoder.conv_out.conv.weight - trained.decoder.conv_out.conv.weight).abs().max() > 1e-6
    spread = train_vae.spread(trained, train_vae.Film(film, CHECK.footage_sizes, CPU), CHECK)
    assert spread * trained.config.scaling_factor == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_the_pipelines_are_saved_and_loaded_with_every_part(folder, kind, tmp_path):
    pipeline = parts.pipeline(kind, folder)
    pipeline.save_pretrained(tmp_path)
    loaded = type(pipeline).from_pretrained(tmp_path, local_files_only=True)
    assert loaded.transformer.config.task_type == kind
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            again = getattr(loaded, name).state_dict()
            assert all(torch.equal(weight, again[key]) for key, weight in part.state_dict().items())
    prompt = 'a red circle says "K" 🐇'
    assert loaded.tokenizer(prompt)["input_ids"] == pipeline.tokenizer(prompt)["input_ids"]


def test_the_image_encoder_sees_in_training_what_the_pipeline_shows_it(folder):
    pipeline = parts.pipeline("i2v", folder)
    frame = world.render(world.Clip("star", "red", "still", background="brick wall"), 1, 160, 256)[:, 0]
    with torch.no_grad():
        ours = latents.see(frame[None] * 2 - 1, pipeline.image_encoder)
        theirs = pipeline.encode_image(report.picture(frame.permute(1, 2, 0)), 1, CPU, torch.float32)
    assert (ours - theirs).square().mean() < 1e-3 * theirs.square().mean()


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_the_transformer_is_trained_on_what_the_pipeline_gives_it(folder, kind, monkeypatch):
    """The pipeline's calls of the transformer, of which the second has no caption, are examples of the training's."""
    studio = report.Studio(folder, kind, CHECK, CPU)
    pipeline, bucket = studio.pipeline, CHECK.buckets[0]
    clip = world.Clip("star", "red", "left", letter="K")
    frame = world.render(clip, 1, *bucket.size)[:, 0]
    model, calls = pipeline.transformer, []
    forward = model.forward
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.abs().max() < 0.01:  # two steps of training leave the gates of all conditions shut
            weight.normal_(std=0.05)

    def recorded(**given: torch.Tensor) -> tuple:
        result = forward(**given)
        calls.append((given, result[0]))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", recorded)
        studio.video(clip.caption, 0, 6.0, report.picture(frame.permute(1, 2, 0)) if kind == "i2v" else None)
    library = latents.read([clip.caption], text.encoders(), CPU)
    letter, image = library.letters.index("K"), kind == "i2v"
    set_key_masks(model)
    with torch.no_grad():
        seen = latents.see(frame[None] * 2 - 1, text.encoders()["image_encoder"])
        known = (
            pipeline.vae.encode(frame[None, :, None] * 2 - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
        )
        assert len(calls) == 2 * CHECK.steps
        for number, (given, theirs) in enumerate(calls):
            noisy = given["hidden_states"][:, :32]
            condition = torch.zeros_like(noisy[:, :1]), torch.zeros_like(noisy)
            if image:
                condition[0][:, :, 0], condition[1][:, :, :1] = 1, known
            row, letters = ((1, letter), (0, 0))[number % 2]
            ours = velocity(
                model,
                torch.cat([noisy, condition[1], condition[0]], dim=1),
                torch.tensor([1000.0 * pipeline.scheduler.sigmas[number // 2]]),
                (library.texts[row, None].float(), library.text_masks[row, None]),
                (library.glyphs[letters, None].float(), library.glyph_masks[letters, None]),
                (seen, torch.full((1, seen.shape[1]), image)),
            )
            assert (ours - theirs).square().mean() < 1e-4 * theirs.square().mean()


def test_the_first_latent_of_a_clip_is_its_first_pictures_latent():
    """The transformer is trained with the former as the condition; the pipeline gives it the latter."""
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo15(**CHECK.vae)
    clip = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    with torch.no_grad():
        whole, first = (vae.encode(part).latent_dist.mode() for part in (clip, clip[:, :, :1]))
    assert (whole[:, :, :1] - first).abs().max() < 1e-5


def test_errors_count_more_where_the_shape_of_a_clip_is_or_was_within_four_frames():
    film = train_vae.Film(torch.zeros(3, 20, 60, 96, dtype=torch.uint8), ((60, 96),), CPU)
    for seed in range(8):
        pixels, weights = film.clip(Crops(1, 1, 9, (48, 80)), 0.0, random.Random(seed))
        assert pixels.shape == (3, 9, 48, 80) and weights.shape == (1, 9, 48, 80)
        shape = pixels.amax(0) > 2 * measure.THRESHOLD - 1
        assert shape.any() and (weights[0][shape] == train_vae.EMPHASIS).float().mean() > 0.95
        for frame in range(9):
            near = shape[max(0, frame - 4) : frame + 5].any(0)
            assert (weights[0, frame][near] > 1).all()
        assert (weights == 1).float().mean() > 0.2
    _, weights = film.clip(Crops(1, 1, 9, (48, 80)), 1.0, random.Random(0))
    assert (weights == 1).all()


def test_a_larger_error_of_the_shape_gives_a_larger_loss():
    torch.manual_seed(0)
    vae = parts.new_vae(**CHECK.vae)
    clip = world.Clip("circle", "red", "still")
    clips = world.render(clip, 5, 32, 48)[None] * 2 - 1
    near, noise = world.coverage(clip, 5, 32, 48)[None, None], train_vae.latent_noise(clips)
    with train_vae.training_forms(), torch.no_grad():
        plain, weighted = (train_vae.losses(vae, clips, 1 + weight * near, noise) for weight in (0, 3))
    assert weighted["loss"] > 1.2 * plain["loss"] and weighted["PSNR"] == plain["PSNR"]


def test_some_clips_have_their_colour_channels_permuted():
    pixels = torch.tensor([1.0, 2.0, 3.0])[:, None, None, None].expand(3, 5, 4, 6)
    source = random.Random(0)
    orders = [tuple(train_vae.permuted(pixels, 0.3, source)[:, 0, 0, 0].tolist()) for _ in range(300)]
    assert len(set(orders)) == 6 and orders.count((1.0, 2.0, 3.0)) > 180


def test_a_wrong_colour_gives_a_larger_loss_than_a_wrong_brightness():
    class Wrong(nn.Module):
        """Decodes grey with an error in each channel."""

        def __init__(self, *error: float) -> None:
            super().__init__()
            self.encoder = lambda clips: torch.zeros(1, 64, 2, 2, 3)
            self.decoder = lambda latents: torch.tensor(error)[:, None, None, None].expand(1, 3, 5, 32, 48)

    clips = torch.zeros(1, 3, 5, 32, 48)
    weights, noise = torch.ones(1, 1, 5, 32, 48), train_vae.latent_noise(clips)
    colour, brightness = (
        train_vae.losses(Wrong(*error), clips, weights, noise)["loss"] for error in ((0.2, -0.2, 0.2), (0.2, 0.2, 0.2))
    )
    assert colour > 1.5 * brightness


def test_the_first_channels_of_latents_are_trained_to_be_the_mean_colours_of_blocks():
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None, None]
    clips = red.expand(3, 9, 32, 48)[None].clone()
    clips[:, :, 5:, :8, 8:16] *= -1  # the second block of the last latent frame's first position
    colours = train_vae.block_colours(clips)
    expected = red.repeat_interleave(4, dim=0).expand(12, 3, 2, 3)[None].clone()
    expected[:, 1::4, 2, 0, 0] *= -1
    assert torch.equal(colours, expected)

    class Holding(nn.Module):
        """Encodes to given first channels, and decodes without an error."""

        def __init__(self, channels: torch.Tensor) -> None:
            super().__init__()
            latents = torch.cat([channels, torch.zeros(1, 52, 3, 2, 3)], dim=1)
            self.encoder, self.decoder = (lambda clips: latents), (lambda latents: clips)

    weights, noise = torch.ones(1, 1, 9, 32, 48), train_vae.latent_noise(clips)
    colours = train_vae.CONTRAST * colours
    right, wrong = (train_vae.losses(Holding(x), clips, weights, noise)["loss"] for x in (colours, 0 * colours))
    assert right < 0.01 < 0.9 < wrong


def test_the_decoder_alone_is_trained_without_a_change_of_the_encoder():
    torch.manual_seed(0)
    vae = parts.new_vae(**CHECK.vae)
    clips = world.render(world.Clip("circle", "red", "still"), 5, 32, 48)[None] * 2 - 1
    weights, noise = torch.ones_like(clips[:, :1]), train_vae.latent_noise(clips)
    with train_vae.training_forms():
        plain, doubled = (
            train_vae.decoder_losses(vae.encoder, vae.decoder, clips, factor * weights, noise) for factor in (1, 2)
        )
        plain["loss"].backward()
    assert doubled["loss"] == 2 * plain["loss"] and doubled["PSNR"] == plain["PSNR"]
    assert all(weight.grad is None for weight in vae.encoder.parameters())
    assert sum(float(weight.grad.abs().sum()) for weight in vae.decoder.parameters() if weight.grad is not None) > 0


def test_the_first_picture_is_given_of_clips_whose_place_the_caption_does_not_tell():
    bucket = Bucket(1.0, 400, 10, 5, (32, 32))
    clips = torch.arange(12.0)[:, None, None, None, None]  # ten of the world, two of the footage
    encoded = latents.EncodedBucket(
        bucket, clips, *(torch.zeros(12, dtype=torch.long) for _ in range(2)), torch.zeros(12, 1)
    )
    library = latents.Library({}, *(torch.zeros(1, 1) for _ in range(2)), [""], *(torch.zeros(1, 1) for _ in range(2)))
    clean, _, _, given, *_ = train_transformer.sample(library, encoded, CHECK, torch.Generator().manual_seed(0))
    anywhere = clean.flatten() < bucket.anywhere
    assert given[anywhere].all() and anywhere.sum() > 50
    assert 0 < given[~anywhere].float().mean() < 0.3


def test_guided_predictions_are_trained_to_be_the_velocity():
    """At no loss, guidance gives the velocity; a prediction without a caption is the velocity itself."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 3, 32, 2, 2, 2).unbind()
    target, alone, guidance = noise - clean, torch.randn_like(clean), 3.0
    silent = torch.tensor([False, True, False])
    predicted = torch.where(silent[:, None, None, None, None], target, alone + (target - alone) / guidance)
    answers = [alone, predicted]

    def velocity(model: nn.Module, latents: torch.Tensor, *_: object) -> torch.Tensor:
        return answers.pop(0)

    valid = torch.ones(3, 2, dtype=torch.bool)
    words = (torch.zeros(3, 2, 4), valid) * 2
    nothing = (torch.zeros(1, 2, 4), valid[:1]) * 2
    inputs = (clean, noise, torch.rand(3), ~silent, silent, *words, *nothing, torch.zeros(3, 2, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_transformer, "velocity", velocity)
        figures = train_transformer.losses(nn.Module(), guidance, *inputs)
        assert figures["loss"] < 1e-10
        answers[:] = [target, target]  # where both agree, guidance adds nothing
        assert train_transformer.losses(nn.Module(), guidance, *inputs)["loss"] < 1e-10
        answers[:] = [alone, target]
        assert train_transformer.losses(nn.Module(), guidance, *inputs)["error"] > 1


def test_the_loss_falls_when_the_clips_are_reconstructed_better():
    torch.manual_seed(0)
    vae = parts.new_vae(**CHECK.vae)
    clips = world.render(world.Clip("circle", "red", "left"), 5, 32, 48)[None] * 2 - 1
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    values = []
    with train_vae.training_forms():
        for _ in range(24):
            figures = train_vae.losses(vae, clips, torch.ones_like(clips[:, :1]), train_vae.latent_noise(clips))
            optimizer.zero_grad()
            figures["loss"].backward()
            optimizer.step()
            values.append(float(figures["loss"].detach()))
    assert values[-1] < 0.8 * values[0]


def test_the_report_would_see_videos_that_follow_their_prompt(folder, monkeypatch):
    """With a stand-in that draws what the prompt says, all are right; with one that draws another thing, none is."""
    recipe = dataclasses.replace(CHECK, judged_combinations=6)
    studio = report.Studio(folder, "t2v", recipe, CPU)
    combinations = world.combinations(held_out=True)[:6]
    by_caption = {
        world.Clip(*one, background=world.BACKGROUNDS[i % 5]).caption: one for i, one in enumerate(combinations)
    }

    def drawing(shift: int):
        def video(prompt: str, seed: int, guidance: float, image: object = None) -> torch.Tensor:
            number = combinations.index(by_caption[prompt]) + shift
            return world.render(world.Clip(*combinations[number % 6]), 9, 96, 160).permute(1, 2, 3, 0)

        return video

    for shift, right, other in ((0, 1, 0), (1, 0, 1)):
        monkeypatch.setattr(studio, "video", drawing(shift))
        figures = report.judge_prompts(studio, 6.0, folder)
        assert figures["right"] == right and figures["right for another prompt"] == other
    assert measure.look(drawing(0)(next(iter(by_caption)), 0, 6.0)) == measure.Seen(*combinations[0])
