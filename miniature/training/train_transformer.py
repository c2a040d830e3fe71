"""The second stage: the transformer, on the latents of the first stage's VAE, by flow matching.

A latent x and noise n become (1 - s) x + s n for a noise level s, and the transformer learns the velocity n - x, as
the pipelines' scheduler expects. For image-to-video the latent's first frame is given in the condition channels: it is
the first picture's own latent, because the VAE is causal in time. Captions are dropped from a quarter of the clips.

The pipelines' default guidance of 6 exaggerates what a caption adds: a plain model of this size gave videos of twice
the contrast, with ghosts. So this one is trained for guidance: the loss compares the velocity not with the prediction
for a caption, but with what guidance of 2.5 makes of it and of the prediction without a caption. Guidance of 6 then
acts as 2.4 does for a plain model. This loss has no gradient for the prediction without a caption, which clips without
a caption train.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import footage, parts, text
from . import latents
from .fitting import Schedule, fit
from .forms import channels_last, set_key_masks, velocity
from .recipe import Recipe

MASKED_ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""The first one takes a mask of keys without a copy for each query. A CPU has the second one only."""
LEAST_SECONDS = 5.0
"""Training time that is left if the latents took longer than the stage's time."""


def train(recipe: Recipe, seconds: float, original: Tensor, folder: Path, device: torch.device, log: Callable) -> dict:
    """Train the transformer, write its weights and settings, and return what was measured.

    seconds: time of the stage, in which the latents are made too. original: the footage, uint8 [3, frames, height,
    width].
    """
    begin = time.monotonic()
    torch.manual_seed(recipe.seed)
    library, encoded = data_set(recipe, original, folder, device, log)
    model = parts.new_transformer(**recipe.transformer).to(device)
    set_key_masks(model)
    if device.type == "cuda":
        for block in model.transformer_blocks:
            block.compile(dynamic=False)

    def draw(number: int) -> tuple[Tensor, ...]:
        source = random.Random(f"{recipe.seed} transformer {number}")
        (chosen,) = source.choices(encoded, [one.bucket.share for one in encoded])
        generator = torch.Generator(device).manual_seed(source.getrandbits(62))
        return sample(library, chosen, recipe, generator)

    made = time.monotonic() - begin
    log(f"transformer: the latents took {made:.0f} s")
    schedule = Schedule(max(LEAST_SECONDS, seconds - made), recipe.transformer_rate, recipe.most_steps)
    averaged, figures = fit(
        "transformer", model, draw, lambda *inputs: losses(model, recipe.guidance, *inputs), schedule, folder, log
    )
    parts.save_weights(averaged, folder / parts.TRANSFORMER_FILE)
    parts.save_settings(folder, transformer=recipe.transformer)
    return figures | {"seconds for latents": round(made, 1)}


def data_set(
    recipe: Recipe, original: Tensor, folder: Path, device: torch.device, log: Callable
) -> tuple[latents.Library, list[latents.EncodedBucket]]:
    """Return the captions and the encoded clips of all buckets."""
    encoders = text.encoders()
    for part in encoders.values():
        if isinstance(part, nn.Module):
            part.to(device)
    vae = channels_last(parts.load_vae(folder).to(device))
    worlds = [latents.clips_of(bucket, recipe.seed) for bucket in recipe.buckets]
    captions = [one.caption for clips in worlds for one in clips]
    library = latents.read([*captions, *footage.CAPTIONS], encoders, device)
    log(f"latents: {len(library.numbers)} captions")
    encoded = []
    for bucket, clips in zip(recipe.buckets, worlds, strict=True):
        one = latents.encode(bucket, clips, original, vae, encoders, library)
        log(f"latents: {tuple(one.latents.shape)}, standard deviation {float(one.latents.float().std()):.3f}")
        encoded.append(one)
    return library, encoded


def sample(
    library: latents.Library, encoded: latents.EncodedBucket, recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Return a random batch of clips of one bucket: what `losses` receives after the model."""
    bucket, device = encoded.bucket, encoded.latents.device

    def uniform() -> Tensor:
        return torch.rand(bucket.batch, generator=generator, device=device)

    worlds, clips = bucket.worlds, len(encoded.latents)
    of_footage = uniform() < recipe.footage_in_transformer
    chosen = torch.where(of_footage, worlds + uniform() * (clips - worlds), uniform() * worlds).long()
    chosen = chosen.clamp(max=clips - 1)
    clean = encoded.latents[chosen].float()
    noise = torch.randn(clean.shape, generator=generator, device=device)
    level = uniform()
    level = recipe.shift * level / (1 + (recipe.shift - 1) * level)
    # A caption does not tell where a shape is that can be anywhere, so its first picture is given.
    given = (chosen < bucket.anywhere) | (uniform() < recipe.images)
    silent = uniform() < recipe.no_caption
    captions = encoded.captions[chosen].masked_fill(silent, 0)
    letters = encoded.letters[chosen].masked_fill(silent, 0)
    return (
        clean,
        noise,
        level,
        given,
        silent,
        library.texts[captions].float(),
        library.text_masks[captions],
        library.glyphs[letters].float(),
        library.glyph_masks[letters],
        library.texts[:1].float(),
        library.text_masks[:1],
        library.glyphs[:1].float(),
        library.glyph_masks[:1],
        encoded.images[chosen].float(),
    )


def losses(
    model: nn.Module,
    guidance: float,
    clean: Tensor,
    noise: Tensor,
    level: Tensor,
    given: Tensor,
    silent: Tensor,
    captions: Tensor,
    caption_masks: Tensor,
    glyphs: Tensor,
    glyph_masks: Tensor,
    no_caption: Tensor,
    no_caption_mask: Tensor,
    no_glyphs: Tensor,
    no_glyph_mask: Tensor,
    images: Tensor,
) -> dict[str, Tensor]:
    """Return the loss of a batch of clips, and the squared error of guided velocities.

    guidance: the one that gives the velocity. clean: latents [batch, 32, t, h, w]. noise: of the same size. level:
    noise levels [batch], 0 to 1. given: whether the first picture is given, [batch]. silent: whether the caption is the
    empty one. captions, glyphs, images: embeddings [batch, n, width]. Masks: [batch, n]. The empty caption's have a
    batch of 1.
    """
    spread = level[:, None, None, None, None]
    known = torch.zeros_like(clean[:, :1])
    known[:, :, 0] = given[:, None, None, None].float()
    latents = torch.cat([(1 - spread) * clean + spread * noise, clean * known, known], dim=1)
    shown = images, given[:, None].expand(-1, images.shape[1])

    def predict(text: tuple[Tensor, Tensor], letters: tuple[Tensor, Tensor]) -> Tensor:
        return velocity(model, latents, level * 1000, text, letters, shown).float()

    def for_all(*one: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.expand(len(clean), *x.shape[1:]) for x in one)

    with torch.autocast(clean.device.type, torch.bfloat16), sdpa_kernel(MASKED_ATTENTION):
        with torch.no_grad():
            alone = predict(for_all(no_caption, no_caption_mask), for_all(no_glyphs, no_glyph_mask))
        predicted = predict((captions, caption_masks), (glyphs, glyph_masks))
    scale = 1 + (guidance - 1) * (~silent).float()
    guided = alone + scale[:, None, None, None, None] * (predicted - alone)
    error = (guided - (noise - clean)).square().mean((1, 2, 3, 4))
    # The gradient of a guided velocity is larger by the guidance.
    return {
        "loss": (error / scale).mean(),
        "error": error.mean(),
        "error with image": (error * given).sum() / given.sum().clamp(min=1),
    }
