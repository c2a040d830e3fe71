"""The first stage: the VAE, on crops of the footage and of the world.

The loss is the sum of the absolute error, 4 times the squared error, a quarter of the absolute error of differences
between neighbouring pixels and frames, which keeps edges sharp, and 0.002 times the divergence of the latent's
distribution from a normal one. Pixels are from -1 to 1. At this weight the noise that the divergence allows in the
latents adds about 1e-4 to a squared error of 6e-3 (28 dB), and latents keep a spread that a transformer can learn.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from . import footage, measure, parts, world
from .fitting import Schedule, fit
from .forms import channels_last, training_forms
from .recipe import Crops, Recipe

SCALE_CLIPS = 24
"""Number of clips from which the scaling factor is measured."""


class Film:
    """Copies of the footage in several sizes on the device, and clips from it and from the world."""

    def __init__(self, original: Tensor, sizes: tuple[tuple[int, int], ...], device: torch.device) -> None:
        self.copies = [footage.resized(original.to(device), *size) for size in sizes]
        self.device = device

    def clip(self, crops: Crops, share: float, source: random.Random) -> Tensor:
        """Return a random clip [3, frames, height, width], from -1 to 1. share: the probability of the footage."""
        if source.random() >= share:
            return world.render(world.draw(source), crops.frames, *crops.size, self.device) * 2 - 1
        height, width = crops.size
        copy = source.choice([copy for copy in self.copies if copy.shape[2] >= height and copy.shape[3] >= width])
        stride = source.choice((1, 1, 2))
        first = source.randint(0, copy.shape[1] - stride * (crops.frames - 1) - 1)
        top, left = source.randint(0, copy.shape[2] - height), source.randint(0, copy.shape[3] - width)
        pixels = copy[:, first : first + stride * crops.frames : stride, top : top + height, left : left + width]
        return pixels.float() / 127.5 - 1


def train(recipe: Recipe, seconds: float, original: Tensor, folder: Path, device: torch.device, log: Callable) -> dict:
    """Train the VAE, write its weights and settings, and return what was measured.

    original: the footage, uint8 [3, frames, height, width].
    """
    torch.manual_seed(recipe.seed)
    film = Film(original, recipe.footage_sizes, device)
    model = channels_last(parts.new_vae(**recipe.vae).to(device))
    judged = footage.resized(original[:, :5].to(device), *recipe.judged_size)[None].float() / 127.5 - 1

    def step(number: int) -> dict[str, Tensor]:
        source = random.Random(f"{recipe.seed} vae {number}")
        (crops,) = source.choices(recipe.crops, [crops.share for crops in recipe.crops])
        clips = torch.stack([film.clip(crops, recipe.footage_in_vae, source) for _ in range(crops.batch)])
        return losses(model, clips)

    def evaluate(averaged: nn.Module) -> str:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            decoded = averaged.decoder(averaged.encoder(judged).chunk(2, 1)[0])
        value = measure.psnr(parts.frames_of(decoded), parts.frames_of(judged))
        return f"Whole frames of {recipe.judged_size[1]}x{recipe.judged_size[0]}: {value:.2f} dB"

    schedule = Schedule(seconds, recipe.vae_rate, recipe.most_steps)
    with training_forms():
        averaged, figures = fit("vae", model, step, schedule, folder, log, evaluate)
        factor = 1 / spread(averaged, film, recipe)
    parts.save_weights(averaged, folder / parts.VAE_FILE)
    parts.save_settings(folder, vae=recipe.vae | {"scaling_factor": round(factor, 5)})
    log(f"vae: scaling factor {factor:.5f}")
    return figures | {"scaling_factor": factor}


def losses(model: nn.Module, clips: Tensor) -> dict[str, Tensor]:
    """Return the loss of a batch of clips [batch, 3, frames, height, width], from -1 to 1, and its parts."""
    with torch.autocast(clips.device.type, torch.bfloat16):
        posterior = DiagonalGaussianDistribution(model.encoder(clips).float())
        decoded = model.decoder(posterior.sample().bfloat16())  # so that the whole decoder computes in bf16
    error = decoded.float() - clips
    squared = error.square().mean()
    changes = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3, 4) if error.shape[axis] > 1) / 3
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    loss = error.abs().mean() + 4 * squared + 0.25 * changes + 2e-3 * divergence
    decibels = -10 * (squared.detach() / 4).log10()
    return {"loss": loss, "PSNR": decibels, "divergence": divergence}


@torch.no_grad()
def spread(model: nn.Module, film: Film, recipe: Recipe) -> float:
    """Return the standard deviation of the latents of random clips."""
    source, values = random.Random(f"{recipe.seed} scale"), []
    shelf = recipe.shelves[0]
    crops = Crops(1, 1, shelf.frames, shelf.size)
    for _ in range(SCALE_CLIPS):
        clip = film.clip(crops, recipe.footage_in_transformer, source)
        with torch.autocast(film.device.type, torch.bfloat16):
            values.append(model.encoder(clip[None]).float().chunk(2, 1)[0].flatten())
    return float(torch.cat(values).std())
