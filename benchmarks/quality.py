"""Measure the quality of decodes: PSNR and SSIM against diffusers' untiled float32 decode, and against the original.

    python -m benchmarks.quality

The miniature's trained VAE encodes frames of Big Buck Bunny (miniature/footage.py). Groups of one, two and four ranks
decode the latent in both modes, with several tile sizes, in float32, bfloat16 and float16: on GPUs if there are enough
for the group, otherwise on CPUs. diffusers computes the reference on the CPU. Each row has the PSNR in dB and the SSIM,
over all frames, and the largest difference from the reference in levels of 255. `psnr` does not exceed 120 dB. Writes
JSON and a Markdown table.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.core_graph import new_report, write
from benchmarks.decode import ROOT, target
from distributed import RankGroup
from miniature import footage, parts
from miniature.measure import psnr, ssim

FIRST = 60
"""The first frame of the footage that is used. The rabbit has come out of its burrow."""
SEAMLESS = {"mode": "seamless"}
TILED = {"mode": "tiled", "tile_size": 256, "overlap": 64}
"""The default tiles, which are those of diffusers."""
SMALL = {"mode": "tiled", "tile_size": 128, "overlap": 32}
UNBLENDED = {"mode": "tiled", "tile_size": 128, "overlap": 0}
DECODES = {
    "float32": (SEAMLESS, TILED, SMALL, UNBLENDED),
    "bfloat16": (SEAMLESS, TILED),
    "float16": (SEAMLESS, TILED),
}
"""The arguments of the decodes that are measured, by dtype."""


def clip(height: int, width: int, frames: int) -> Tensor:
    """Return frames of the footage, [frames, height, width, 3] from 0 to 1. frames: 4n + 1."""
    chosen = footage.read(footage.find(), FIRST, frames)
    return footage.resized(chosen, height, width).permute(1, 2, 3, 0) / 255


def reference(original: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return a clip's latent, the weights of the miniature's VAE, and diffusers' untiled float32 decode as a clip."""
    vae = parts.load_vae()
    with torch.inference_mode():
        latent = vae.encode((2 * original - 1).permute(3, 0, 1, 2)[None]).latent_dist.mode()
        return latent, vae.state_dict(), parts.frames_of(vae.decode(latent).sample)


def compare(frames: Tensor, untiled: Tensor, original: Tensor) -> dict[str, float]:
    """Return the columns of a row. All clips are [frames, height, width, 3] from 0 to 1."""
    return {
        "psnr_untiled": round(psnr(frames, untiled), 2),
        "ssim_untiled": round(ssim(frames, untiled), 5),
        "levels": float(f"{255 * float((frames - untiled).abs().max()):.2g}"),
        "psnr_original": round(psnr(frames, original), 2),
        "ssim_original": round(ssim(frames, original), 5),
    }


def devices(ranks: int) -> str:
    """Return the `devices` of a group: GPUs if there are enough, otherwise CPUs."""
    return ",".join(f"cuda:{rank}" if torch.cuda.device_count() >= ranks else "cpu" for rank in range(ranks))


def name_of(mode: str, tile_size: int = 0, overlap: int = 0) -> str:
    return f"{mode} {tile_size}, overlap {overlap}" if tile_size else mode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="480x848x5", help="height, width and frames (4n + 1)")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks, comma-separated")
    parser.add_argument("--dtypes", default=",".join(DECODES), help="comma-separated")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    original = clip(*map(int, options.size.split("x")))
    latent, weights, untiled = reference(original)
    command = f"python -m benchmarks.quality --size {options.size} --ranks {options.ranks} --dtypes {options.dtypes}"
    report = new_report(command, target(0)[0])

    def add(devices: str, decode: str, dtype: str, frames: Tensor) -> None:
        row = {"devices": devices, "decode": decode, "dtype": dtype, **compare(frames, untiled, original)}
        print(row, flush=True)
        report["rows"].append(row)
        write(report, options.out, "quality", "PSNR in dB, at most 120, largest difference in levels of 255")

    add("cpu", "diffusers untiled", "float32", untiled)
    for ranks in map(int, options.ranks.split(",")):
        with RankGroup(devices(ranks)) as group:
            for dtype in options.dtypes.split(","):
                group.configure(dtype=dtype)
                for decode in DECODES[dtype]:
                    (frames,) = group.decode(latent, weights, **decode)
                    add(devices(ranks), name_of(**decode), dtype, frames)


if __name__ == "__main__":
    main()
