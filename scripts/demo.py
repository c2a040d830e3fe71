"""Text to video in a real, headless ComfyUI, decoded by one rank and by two ranks. Run by `make demo`.

Queues api_prompts/text_to_video.json over HTTP and follows it on the websocket, for both modes and for one and two
ranks. Writes a video and a contact sheet for each mode, prints their paths and the time of each stage, and compares the
frames of one and two ranks, and of both modes. Exits with status 1 if the number of ranks changes the frames.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from comfyui_host import Host, Run
from set_up import ROOT, comfyui_path

sys.path.insert(0, str(ROOT))
from miniature.measure import psnr, ssim

STAGES = {"text encoding": ("pipeline", "text"), "denoising": ("sampler",), "decoding": ("decode",)}
SEAMLESS_LEVELS = 1
"""Allowed difference, of 255 levels. Libraries may sum in another order for other sizes, which changes the rounding."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "demo_output", help="folder for the files")
    parser.add_argument("--prompt", help="a prompt, instead of the example's")
    parser.add_argument("--model", help="a folder in ComfyUI's models/diffusers, instead of the built-in tiny model")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    graph = json.loads((ROOT / "api_prompts" / "text_to_video.json").read_text())
    if options.prompt:
        graph["text"]["inputs"]["positive"] = options.prompt
    if options.model:
        graph["pipeline"]["inputs"]["model"] = options.model
    graph["frames"] = {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "frames/f"}}

    rows, files, verdicts, decoded, same = [], [], [], {}, True
    with tempfile.TemporaryDirectory(prefix="hv15-demo-") as folder:
        print("Starting ComfyUI ...", flush=True)
        host = Host(Path(folder), comfyui_path() / "models")
        try:
            host.wait()
            for mode in ("tiled", "seamless"):
                results = []
                for devices in two_choices():
                    run = run_uncached(host, graph, mode, devices)
                    rows.append((mode, devices, run))
                    results.append(host.pictures(run, "frames"))
                video = host.saved(run.outputs["save"]["images"][0])
                files.append(Path(shutil.copy(video, options.output / f"text_to_video_{mode}{video.suffix}")))
                files.append(contact_sheet(files[-1], options.output / f"text_to_video_{mode}.jpg"))
                decoded[mode] = results[0]
                same &= largest_difference(*results) <= (SEAMLESS_LEVELS if mode == "seamless" else 0)
                verdicts.append((f"{mode}, one rank and two ranks", describe(*results)))
        finally:
            host.close()
    print_table(rows)
    verdicts.append(("tiled and seamless", describe(*decoded.values())))
    print("\nFrames compared")
    print("\n".join(f"  {names:34} {verdict}" for names, verdict in verdicts))
    print("\nFiles")
    print("\n".join(f"  {file}" for file in files))
    if not same:
        print("\nThe frames of one rank and of two ranks differ.", file=sys.stderr)
    return 0 if same else 1


def two_choices() -> tuple[str, str]:
    """Return the devices for one rank and for two ranks: GPUs if there are two, otherwise CPUs."""
    return ("cuda:0", "cuda:0,cuda:1") if torch.cuda.device_count() > 1 else ("cpu", "cpu,cpu")


def run_uncached(host: Host, graph: dict, mode: str, devices: str) -> Run:
    """Run the graph without ComfyUI's cache, so that every stage is timed."""
    host.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)  # the server clears its cache in the background
    graph["ranks"]["inputs"]["devices"] = devices
    graph["decode"]["inputs"]["mode"] = mode
    bar = ProgressBar(f"{mode}, {rank_count(devices)}")
    run = host.run(graph, bar.follow)
    bar.end()
    if run.error:
        raise SystemExit(f"{run.error['node_type']} failed: {run.error['exception_message']}")
    return run


class ProgressBar:
    """The running node and its progress, on one line of the terminal."""

    WIDTH = 30

    def __init__(self, title: str) -> None:
        self.title, self.live = title, sys.stdout.isatty()

    def follow(self, type: str, data: dict) -> None:
        if type == "executing" and data.get("node"):
            self.show(data["node"], 0)
        elif type == "progress":
            self.show(data["node"], data["value"] / max(1, data["max"]))

    def show(self, node: str, fraction: float) -> None:
        filled = round(self.WIDTH * fraction)
        line = f"{self.title:18} {node:9} [{'#' * filled}{'.' * (self.WIDTH - filled)}] {fraction:4.0%}"
        if self.live:
            print(f"\r{line}", end="", flush=True)
        elif fraction in (0, 1):
            print(line, flush=True)

    def end(self) -> None:
        if self.live:
            print()


def contact_sheet(video: Path, target: Path) -> Path:
    """Write one picture with eight evenly spaced frames of a video in two rows, and return its path."""
    with av.open(str(video)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    columns, count = 4, min(8, len(frames))
    chosen = [frames[index] for index in np.linspace(0, len(frames) - 1, count).round().astype(int)]
    width, height = chosen[0].size
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    for index, frame in enumerate(chosen):
        sheet.paste(frame, (index % columns * width, index // columns * height))
    sheet.save(target, quality=90)
    return target


def rank_count(devices: str) -> str:
    count = devices.count(",") + 1
    return f"{count} rank" + "s" * (count > 1)


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def describe(one: np.ndarray, other: np.ndarray) -> str:
    """Return how much frames [frames, height, width, 3] of 0 to 255 differ, with PSNR and SSIM."""
    if (levels := largest_difference(one, other)) == 0:
        return "identical (SSIM 1)"
    a, b = (torch.from_numpy(frames) / 255 for frames in (one, other))
    return f"differ by up to {levels} of 255 levels (PSNR {psnr(a, b):.1f} dB, SSIM {ssim(a, b):.4f})"


def print_table(rows: list[tuple[str, str, Run]]) -> None:
    print("\nSeconds" + " " * 21 + "".join(f"{name:>15}" for name in (*STAGES, "total")))
    for mode, devices, run in rows:
        times = [sum(run.seconds.get(node, 0) for node in nodes) for nodes in STAGES.values()]
        cells = "".join(f"{value:15.2f}" for value in (*times, sum(run.seconds.values())))
        print(f"{mode:10}{rank_count(devices):10}{devices[:7]:8}{cells}")


if __name__ == "__main__":
    sys.exit(main())
