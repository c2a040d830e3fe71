"""The first stage: the VAE, on crops of the footage and of the world.

The loss is the sum of the absolute error, 4 times the squared error, both once more for the differences of the
errors of red, green and blue (`TINT`), a quarter of the absolute error of differences between neighbouring pixels and
frames, which keeps edges sharp, and 0.004 times the divergence of the latent's distribution from a normal one. Pixels
are from -1 to 1. At this weight the noise that the divergence allows in the latents adds about 2e-4 to a squared error
of 6e-3 (28 dB). The decoder learns to bear that much noise, which the transformer's errors resemble.

A shape covers an eighth of the picture or less, so errors count more where a shape is or was (`EMPHASIS`). Without that
weight, shapes that move were blurred. Without the weight of tints and the permuted channels of some clips
(`PERMUTED`), green became yellow and pink became grey in 4,500 steps: the colours of the footage and of the other
shapes lie near a plane, and those two do not.

The shortcuts of the downsampling layers pass means of neighbouring channels, in the end one value for all colours, so
brightness comes to the latents by itself and colour does not. Therefore the first channels of the latents are trained
to be the mean colours of blocks (`ANCHOR`).

In the last part of the time the decoder is trained alone, for the squared error of pixels, mostly on the footage. The
latents stay the same.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import footage, measure, parts, world
from .fitting import Schedule, fit
from .forms import channels_last, training_forms
from .recipe import Crops, Recipe

SCALE_CLIPS = 24
"""Number of clips from which the scaling factor is measured."""
EMPHASIS, REACH = 4.0, (4, 4)
"""Weight of errors near a shape, relative to that of others, and how far it reaches: in frames and in pixels."""
TINT = 1.0
"""Weight of the errors' differences between colour channels."""
PERMUTED = 0.3
"""Part of the clips whose colour channels change places."""
ANCHOR, BLOCK = 1.0, 8
"""Weight of the squared difference between the first channels of the latents and the mean colours of blocks, and the
side of these blocks in pixels."""
CONTRAST = 2.0
"""Factor of these mean colours in the latents. Colours from -1 to 1 have a standard deviation of 0.4, and the other
channels of up to 1. With this factor, noise hides the colours no sooner than the other channels."""
LENGTHS = (17, 33)
"""Frames of the clips of the world that crops are cut from, so that shapes move as fast as in the transformer's."""


class Film:
    """Copies of the footage in several sizes on the device, and clips from it and from the world."""

    def __init__(self, original: Tensor, sizes: tuple[tuple[int, int], ...], device: torch.device) -> None:
        self.original, self.device = original.to(device), device
        self.copies = [footage.resized(self.original, *size) for size in sizes]

    def clip(self, crops: Crops, share: float, source: random.Random) -> tuple[Tensor, Tensor]:
        """Return a random clip [3, frames, height, width], from -1 to 1, and the weights of its errors.

        share: the probability of the footage. The weights are [1, frames, height, width].
        """
        return self.footage(crops, source) if source.random() < share else self.world(crops, source)

    def footage(self, crops: Crops, source: random.Random) -> tuple[Tensor, Tensor]:
        """Return a random clip of the footage, and the weights of its errors, which are equal."""
        height, width = crops.size
        copy = source.choice([copy for copy in self.copies if copy.shape[2] >= height and copy.shape[3] >= width])
        stride = source.choice((1, 1, 2))
        first = source.randint(0, copy.shape[1] - stride * (crops.frames - 1) - 1)
        top, left = source.randint(0, copy.shape[2] - height), source.randint(0, copy.shape[3] - width)
        pixels = copy[:, first : first + stride * crops.frames : stride, top : top + height, left : left + width]
        return pixels.float() / 127.5 - 1, torch.ones_like(pixels[:1], dtype=torch.float32)

    def world(self, crops: Crops, source: random.Random) -> tuple[Tensor, Tensor]:
        """Return a random clip of the world, and the weights of its errors."""
        clip, length = world.draw(source), source.choice([n for n in LENGTHS if n >= crops.frames])
        first = source.randint(0, length - crops.frames)
        pixels, near = (
            draw(clip, length, *crops.size, self.device).narrow(-3, first, crops.frames)
            for draw in (world.render, world.coverage)
        )
        (frames, around), near = REACH, near[None, None]
        near = F.max_pool3d(near, (2 * frames + 1, 1, 1), stride=1, padding=(frames, 0, 0))
        near = F.max_pool3d(near, (1, 2 * around + 1, 2 * around + 1), stride=1, padding=(0, around, around))
        return pixels * 2 - 1, 1 + (EMPHASIS - 1) * near[0]


def train(recipe: Recipe, seconds: float, original: Tensor, folder: Path, device: torch.device, log: Callable) -> dict:
    """Train the VAE, write its weights and settings, and return what was measured.

    original: the footage, uint8 [3, frames, height, width].
    """
    torch.manual_seed(recipe.seed)
    film = Film(original, recipe.footage_sizes, device)
    model = channels_last(parts.new_vae(**recipe.vae).to(device))
    with training_forms():
        averaged, figures = fit(
            "vae",
            model,
            lambda number: draw(film, recipe.crops, recipe.footage_in_vae, PERMUTED, f"{recipe.seed} vae {number}"),
            lambda *inputs: losses(model, *inputs),
            Schedule(seconds * (1 - recipe.decoder_alone), recipe.vae_rate, recipe.most_steps),
            folder,
            log,
            lambda averaged: judge(film, recipe, averaged.encoder, averaged.decoder),
        )
        figures_alone = train_decoder(averaged, recipe, seconds * recipe.decoder_alone, film, folder, log)
        factor = 1 / spread(averaged, film, recipe)
    parts.save_weights(averaged, folder / parts.VAE_FILE)
    parts.save_settings(folder, vae=recipe.vae | {"scaling_factor": round(factor, 5)})
    log(f"vae: scaling factor {factor:.5f}")
    return figures | {"decoder alone": figures_alone, "scaling_factor": factor}


def train_decoder(
    vae: nn.Module, recipe: Recipe, seconds: float, film: Film, folder: Path, log: Callable
) -> dict[str, float]:
    """Train the decoder alone, exchange it in the VAE, and return what was measured. Needs `training_forms`."""
    decoder = vae.decoder.requires_grad_()
    vae.decoder, figures = fit(
        "decoder",
        decoder,
        lambda number: draw(film, recipe.decoder_crops, recipe.footage_in_decoder, 0, f"{recipe.seed} {number}"),
        lambda *inputs: decoder_losses(vae.encoder, decoder, *inputs),
        Schedule(seconds, recipe.vae_rate, recipe.most_steps),
        folder,
        log,
        lambda averaged: judge(film, recipe, vae.encoder, averaged),
    )
    return figures


def judge(film: Film, recipe: Recipe, encoder: nn.Module, decoder: nn.Module) -> str:
    """Return how well both reconstruct the first frames of the footage, in words."""
    pixels = footage.resized(film.original[:, :5], *recipe.judged_size)[None].float() / 127.5 - 1
    with torch.no_grad(), torch.autocast(film.device.type, torch.bfloat16):
        decoded = decoder(encoder(pixels).chunk(2, 1)[0])
    value = measure.psnr(parts.frames_of(decoded), parts.frames_of(pixels))
    return f"Whole frames of {recipe.judged_size[1]}x{recipe.judged_size[0]}: {value:.2f} dB"


def draw(
    film: Film, sizes: tuple[Crops, ...], of_footage: float, of_permuted: float, seed: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a random batch of clips, the weights of their errors, and noise for their latents.

    of_footage, of_permuted: the parts of the clips that are of the footage, and whose colour channels change places.
    """
    source = random.Random(seed)
    (crops,) = source.choices(sizes, [crops.share for crops in sizes])
    clips = [film.clip(crops, of_footage, source) for _ in range(crops.batch)]
    weights = torch.stack([weights for _, weights in clips])
    clips = torch.stack([permuted(pixels, of_permuted, source) for pixels, _ in clips])
    generator = torch.Generator(film.device).manual_seed(source.getrandbits(62))
    return clips, weights, latent_noise(clips, generator)


def permuted(pixels: Tensor, probability: float, source: random.Random) -> Tensor:
    """Return the clip, sometimes with its colour channels in another order."""
    if source.random() >= probability:
        return pixels
    return torch.stack([pixels[channel] for channel in source.sample(range(3), 3)])


def latent_noise(clips: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return normal noise of the size of the clips' latents."""
    batch, _, frames, height, width = clips.shape
    shape = (batch, 32, (frames - 1) // 4 + 1, height // 16, width // 16)
    return torch.randn(shape, generator=generator, device=clips.device)


def losses(model: nn.Module, clips: Tensor, weights: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Return the loss of a batch of clips [batch, 3, frames, height, width], from -1 to 1, and its parts.

    weights: of the errors of pixels, [batch, 1, frames, height, width]. noise: normal, of the size of the latents.
    """
    with torch.autocast(clips.device.type, torch.bfloat16):
        latents, mean, logarithm = encoded(model.encoder, clips, noise)
        decoded = model.decoder(latents)
    error = decoded.float() - clips
    weighted = error * weights
    changes = sum(weighted.diff(dim=axis).abs().mean() for axis in (2, 3, 4) if error.shape[axis] > 1) / 3
    divergence = 0.5 * (mean.square() + logarithm.exp() - 1 - logarithm).mean()
    tint = weighted - weighted.mean(1, keepdim=True)
    colours = block_colours(clips)
    loss = (
        weighted.abs().mean()
        + 4 * (weighted * error).mean()
        + TINT * (tint.abs().mean() + 4 * (tint * error).mean())
        + 0.25 * changes
        + 4e-3 * divergence
        + ANCHOR * (mean[:, : colours.shape[1]] - CONTRAST * colours).square().mean()
    )
    return {"loss": loss, "PSNR": decibels(error), "divergence": divergence}


def decoder_losses(
    encoder: nn.Module, decoder: nn.Module, clips: Tensor, weights: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """Return the loss of the decoder alone, which is the weighted squared error. The inputs are those of `losses`."""
    with torch.autocast(clips.device.type, torch.bfloat16):
        with torch.no_grad():
            latents, _, _ = encoded(encoder, clips, noise)
        decoded = decoder(latents)
    error = decoded.float() - clips
    return {"loss": (weights * error.square()).mean(), "PSNR": decibels(error)}


def encoded(encoder: nn.Module, clips: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clips' latents with noise, and the mean of their distribution and the logarithm of its variance."""
    mean, logarithm = encoder(clips).float().chunk(2, 1)
    logarithm = logarithm.clamp(-30, 20)
    latents = mean + (0.5 * logarithm).exp() * noise
    return latents.bfloat16(), mean, logarithm  # so that the whole decoder computes in bf16


def decibels(error: Tensor) -> Tensor:
    """Return the PSNR of pixels from -1 to 1."""
    return -10 * (error.detach().square().mean() / 4).log10()


def block_colours(clips: Tensor) -> Tensor:
    """Return the mean colours of blocks of BLOCK x BLOCK pixels in the frames of each latent frame, as channels.

    clips: [batch, 3, 4 t - 3, 16 h, 16 w], t > 1. Result: [batch, 3 * (16 / BLOCK)^2, t, h, w].
    """
    first = F.avg_pool3d(clips[:, :, :1], (1, BLOCK, BLOCK))
    others = F.avg_pool3d(clips[:, :, 1:], (4, BLOCK, BLOCK))
    return F.pixel_unshuffle(torch.cat([first, others], dim=2).transpose(1, 2), 16 // BLOCK).transpose(1, 2)


@torch.no_grad()
def spread(model: nn.Module, film: Film, recipe: Recipe) -> float:
    """Return the standard deviation of the latents of random clips."""
    source, values = random.Random(f"{recipe.seed} scale"), []
    bucket = recipe.buckets[0]
    crops = Crops(1, 1, bucket.frames, bucket.size)
    for _ in range(SCALE_CLIPS):
        clip, _ = film.clip(crops, recipe.footage_in_transformer, source)
        with torch.autocast(film.device.type, torch.bfloat16):
            values.append(model.encoder(clip[None]).float().chunk(2, 1)[0].flatten())
    return float(torch.cat(values).std())
