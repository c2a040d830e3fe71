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
"""Weight of errors near a shape, by that of others, and how far it reaches: in frames and in pixels."""
TINT = 1.0
"""Weight of the errors' differences between colour channels."""
PERMUTED = 0.3
"""Part of the clips whose colour channels change places."""
ANCHOR, BLOCK = 1.0, 8
"""Weight of the squared difference between the first channels of the latents and the mean colours of blocks, and the
side of these blocks in pixels."""
LENGTHS = (17, 33)
"""Frames of the clips of the world that crops are cut from, so that shapes move as fast as in the transformer's."""


class Film:
    """Copies of the footage in several sizes on the device, and clips from it and from the world."""

    def __init__(self, original: Tensor, sizes: tuple[tuple[int, int], ...], device: torch.device) -> None:
        self.copies = [footage.resized(original.to(device), *size) for size in sizes]
        self.device = device

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
    judged = footage.resized(original[:, :5].to(device), *recipe.judged_size)[None].float() / 127.5 - 1

    def draw(number: int) -> tuple[Tensor, ...]:
        source = random.Random(f"{recipe.seed} vae {number}")
        (crops,) = source.choices(recipe.crops, [crops.share for crops in recipe.crops])
        clips = [film.clip(crops, recipe.footage_in_vae, source) for _ in range(crops.batch)]
        weights = torch.stack([weights for _, weights in clips])
        clips = torch.stack([permuted(pixels, source) for pixels, _ in clips])
        generator = torch.Generator(device).manual_seed(source.getrandbits(62))
        return clips, weights, latent_noise(clips, generator)

    def evaluate(averaged: nn.Module) -> str:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            decoded = averaged.decoder(averaged.encoder(judged).chunk(2, 1)[0])
        value = measure.psnr(parts.frames_of(decoded), parts.frames_of(judged))
        return f"Whole frames of {recipe.judged_size[1]}x{recipe.judged_size[0]}: {value:.2f} dB"

    schedule = Schedule(seconds, recipe.vae_rate, recipe.most_steps)
    with training_forms():
        averaged, figures = fit(
            "vae", model, draw, lambda *inputs: losses(model, *inputs), schedule, folder, log, evaluate
        )
        factor = 1 / spread(averaged, film, recipe)
    parts.save_weights(averaged, folder / parts.VAE_FILE)
    parts.save_settings(folder, vae=recipe.vae | {"scaling_factor": round(factor, 5)})
    log(f"vae: scaling factor {factor:.5f}")
    return figures | {"scaling_factor": factor}


def permuted(pixels: Tensor, source: random.Random) -> Tensor:
    """Return the clip, sometimes with its colour channels in another order."""
    if source.random() >= PERMUTED:
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
        mean, logarithm = model.encoder(clips).float().chunk(2, 1)
        logarithm = logarithm.clamp(-30, 20)
        latents = mean + (0.5 * logarithm).exp() * noise
        decoded = model.decoder(latents.bfloat16())  # so that the whole decoder computes in bf16
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
        + ANCHOR * (mean[:, : colours.shape[1]] - colours).square().mean()
    )
    decibels = -10 * (error.detach().square().mean() / 4).log10()
    return {"loss": loss, "PSNR": decibels, "divergence": divergence}


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
    shelf = recipe.shelves[0]
    crops = Crops(1, 1, shelf.frames, shelf.size)
    for _ in range(SCALE_CLIPS):
        clip, _ = film.clip(crops, recipe.footage_in_transformer, source)
        with torch.autocast(film.device.type, torch.bfloat16):
            values.append(model.encoder(clip[None]).float().chunk(2, 1)[0].flatten())
    return float(torch.cat(values).std())
