"""Measure decodes in one run: this engine's, other implementations', and the floor.

    python -m benchmarks.decode                                   one device
    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.decode     two devices of one host

Weights are random, full size on a GPU and small on the CPU, where the run is only a functional test. Every variant
decodes the same latent, alone on the device, once to warm up and then `--repeat` times; the best time is reported. The
floor is the number of FLOPs of the decoder's convolutions divided by the rate of a matrix product measured in the same
run: briefly, on a cool GPU, and for two seconds, at the temperature of a decode.

Other implementations are measured if they are installed: diffusers' tiled decode, ComfyUI's own decoder (COMFYUI_PATH
or .comfyui) and, on several devices, DistVAE's tiled decode. Rank 0 writes JSON and a Markdown table.
"""

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import runpy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.random_weights import FULL, TINY, decoder_tensors, random_latent
from distributed.errors import OutOfMemory
from distributed.ranks.devices import copiers
from distributed.ranks.task import JobWatch
from distributed.vae import engine
from distributed.vae.engine import Engine
from distributed.vae.halo import Exchange, Halo
from distributed.vae.hunyuanvideo15.layout import to_core
from distributed.vae.job import MODES, DecodeRequest

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
from set_up import ROOT, comfyui_path

COMFYUI = comfyui_path()
SIZES = {
    "480x848x33": (9, 30, 53),
    "480x848x121": (31, 30, 53),
    "720x1280x121": (31, 45, 80),
    "1080x1920x121": (31, 68, 120),
    "64x96x9": (3, 4, 6),
}


def conv_flops(widths: tuple[int, ...], time_: int, height: int, width: int) -> float:
    """Return the FLOPs of the decoder's convolutions, two per multiply-add."""
    total, frames = 0.0, time_
    for level, channels in enumerate(widths):
        pixels = frames * height * width * 4**level
        resnets = (5 if level == 0 else 3) * 2 * channels**2
        following = widths[level + 1] * (8 if level < 2 else 4) if level + 1 < len(widths) else 3
        total += 2 * 27 * pixels * (resnets + channels * following + (32 * channels if level == 0 else 0))
        frames = 2 * frames - 1 if level < 2 else frames
    return total


def synchronize(device: torch.device) -> None:
    """Synchronise with this device, then with the other ranks."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def measure(device: torch.device, decode: Callable[[], object], repeat: int) -> dict:
    """Return the first and the best time of `decode` in seconds, and the peak memory of the last run in GiB.

    All ranks start together. Otherwise a rank that collects more garbage would keep the others waiting in the time that
    is measured. A collective.
    """
    times = []
    for attempt in range(repeat + 1):
        gc.collect()
        if device.type != "cpu":
            accelerator = torch.get_device_module(device)
            if attempt == 0:
                accelerator.empty_cache()
            accelerator.reset_peak_memory_stats(device)
        if dist.is_initialized():
            dist.barrier()
        synchronize(device)
        start = time.perf_counter()
        decode()
        synchronize(device)
        times.append(time.perf_counter() - start)
    result = {"first_s": round(times[0], 3), "best_s": round(min(times[1:]), 3)}
    if device.type != "cpu":
        result["peak_gib"] = round(torch.get_device_module(device).max_memory_allocated(device) / 2**30, 2)
        result["reserved_gib"] = round(torch.get_device_module(device).max_memory_reserved(device) / 2**30, 2)
    return result


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Return the FLOP/s of square matrix products that run for `seconds`."""
    side = 8192 if device.type != "cpu" else 512
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn_like(a)
    a @ b
    count, start = 0, time.perf_counter()
    while True:
        for _ in range(8):
            a @ b
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)
        count += 8
        if time.perf_counter() - start > seconds:
            return 2 * side**3 * count / (time.perf_counter() - start)


def diffusers_vae(tensors: dict, widths: tuple[int, ...], device: torch.device, dtype: torch.dtype):
    """Return diffusers' model with these decoder weights, or None if diffusers is not installed."""
    try:
        from diffusers import AutoencoderKLHunyuanVideo15
    except ImportError:
        return None
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo15(block_out_channels=tuple(reversed(widths)))
    vae.encoder = None
    vae.decoder.to_empty(device=device)
    vae.decoder.load_state_dict(tensors)
    return vae.to(dtype).eval()


def core_decoder(tensors: dict, widths: tuple[int, ...], device: torch.device, dtype: torch.dtype):
    """Return ComfyUI's decoder with these weights, or None if there is no ComfyUI."""
    if not (COMFYUI / "comfy").is_dir():
        return None
    sys.path.append(str(COMFYUI))
    from comfy.cli_args import args

    args.cpu = device.type == "cpu"
    from comfy.ldm.hunyuan_video.vae_refiner import Decoder

    with torch.device("meta"):
        decoder = Decoder(
            z_channels=32,
            out_channels=3,
            block_out_channels=list(reversed(widths)),
            num_res_blocks=2,
            ffactor_spatial=16,
            ffactor_temporal=4,
        )
    decoder.to_empty(device=device)
    renamed = {to_core(f"decoder.{name}").removeprefix("decoder."): tensor for name, tensor in tensors.items()}
    missing, unexpected = decoder.load_state_dict(renamed, strict=False)
    lost = [*unexpected, *(name for name in missing if ".temb_proj." not in name)]  # of ComfyUI 0.33, used by no layer
    if lost:
        raise RuntimeError(f"ComfyUI's decoder and the weights differ in {', '.join(lost[:3])}.")
    return decoder.to(dtype).eval()


Decode = Callable[[Tensor], object]
"""Decodes a latent [1, 32, T, H, W], float32 on the CPU."""


def diffusers_tiled(tensors: dict, widths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Decode | None:
    vae = diffusers_vae(tensors, widths, device, dtype)
    if vae is None:
        return None
    return tiled(vae, device, dtype)


def tiled(vae, device: torch.device, dtype: torch.dtype) -> Decode:
    """Return the tiled decode of a diffusers model."""
    vae.enable_tiling()
    return lambda z: vae.decode(z.to(device, dtype)).sample.float().cpu()


def distvae_tiled(tensors: dict, widths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Decode | None:
    try:
        from distvae.vae import sharing, tiled_decode_for
    except ImportError:
        return None
    vae = diffusers_vae(tensors, widths, device, dtype)
    vae.tiled_decode = tiled_decode_for(vae, *sharing(dist.group.WORLD))
    return tiled(vae, device, dtype)


def core(tensors: dict, widths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Decode | None:
    decoder = core_decoder(tensors, widths, device, dtype)
    return decoder and (lambda z: decoder(z.to(device, dtype)).float().cpu())


class Held:
    """Measures how long this rank's stream waits for exchanges, including the copies of received data.

    In tiled mode this is the whole blending, which starts when the last rank has decoded its tiles.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list = []
        for owner, name in ((Exchange, "finish"), (Halo, "gather"), (engine, "blend_tiles")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, call: Callable) -> Callable:
        def timed(*args: object) -> object:
            start = self._now()
            result = call(*args)
            self.spans.append((start, self._now()))
            return result

        return timed

    def _now(self):
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.get_device_module(self.device).Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Return the seconds since the last call, and reset the measurement."""
        spans, self.spans = self.spans, []
        if self.device.type == "cpu":
            return sum(end - start for start, end in spans)
        return sum(start.elapsed_time(end) for start, end in spans) / 1000


class Ours:
    """This engine in one mode. It also measures the time from the last kernel to the last written pixel."""

    def __init__(
        self,
        mode: str,
        memory: int | None,
        held: Held,
        tensors: dict,
        _: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.mode, self.memory, self.held, self.device = mode, memory, held, device
        start = time.perf_counter()
        self.engine = Engine(tensors, device, dtype)
        synchronize(device)
        self.load_s = round(time.perf_counter() - start, 3)
        self.flush, self.engine.writer.flush = self.engine.writer.flush, self.timed_flush
        self.frames = torch.empty(0)

    def timed_flush(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).current_stream(self.device).synchronize()
        start = time.perf_counter()
        self.flush()
        self.tail_ms = round(1000 * (time.perf_counter() - start), 1)

    def __call__(self, latent: Tensor) -> None:
        job = DecodeRequest(tuple(latent.shape), self.mode, memory=self.memory)
        if self.frames.shape != job.frames_shape:
            self.frames = torch.zeros(job.frames_shape)
        start = time.perf_counter()
        self.engine.decode(job, latent, self.frames, JobWatch())
        self.held_share = round(self.held.seconds() / (time.perf_counter() - start), 4)


def machine(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return torch.get_device_module(device).get_device_name(device)


def target(local: int) -> tuple[torch.device, torch.dtype, tuple[int, ...]]:
    """Return the device, the dtype and the decoder's widths: full size on a GPU, small on the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local), torch.bfloat16, FULL
    return torch.device("cpu"), torch.float32, TINY


def join(device: torch.device) -> tuple[int, int]:
    """Set up this process as a rank process does, connect it to the others, and return its rank and their number."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        torch.set_num_threads(copiers(int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if "RANK" not in os.environ:
        return 0, 1
    backend, bound = ("cpu:gloo,cuda:nccl", device) if cuda else ("gloo", None)
    dist.init_process_group(backend, device_id=bound, timeout=datetime.timedelta(minutes=10))
    return dist.get_rank(), dist.get_world_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default=None, help="comma-separated, of: " + ", ".join(SIZES))
    parser.add_argument("--variants", default="", help="only the variants whose name contains one of these words")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--memory-gib", type=float, default=None, help="memory limit per rank for this engine")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()

    device, dtype, widths = target(int(os.environ.get("LOCAL_RANK", 0)))
    cuda = device.type == "cuda"
    rank, world_size = join(device)
    sizes = (options.sizes or ("480x848x33,480x848x121,720x1280x121,1080x1920x121" if cuda else "64x96x9")).split(",")

    tensors = {name: tensor.cpu() for name, tensor in decoder_tensors(widths, device).items()}
    report = {
        "machine": machine(device),
        "ranks": world_size,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "dtype": str(dtype).removeprefix("torch."),
        "command": f"python -m benchmarks.decode --repeat {options.repeat} --sizes {','.join(sizes)}",
        "matmul_tflops": round(matmul_rate(device, dtype, 0.05) / 1e12, 2),
        "matmul_sustained_tflops": round(matmul_rate(device, dtype, 2) / 1e12, 2),
        "results": [],
    }
    memory = int(options.memory_gib * 2**30) if options.memory_gib else None
    held = Held(device)
    variants = {f"ours {mode}": partial(Ours, mode, memory, held) for mode in MODES}
    if world_size == 1:
        variants |= {"ComfyUI core": core, "diffusers tiled": diffusers_tiled}
    else:
        variants |= {"DistVAE tiled": distvae_tiled}
    variants = {name: build for name, build in variants.items() if is_wanted(name, options.variants)}
    with torch.inference_mode():
        for name in sizes:
            latent = random_latent(1, 32, *SIZES[name])
            floor = conv_flops(widths, *SIZES[name]) / world_size
            rows = {"floor": {"best_s": round(floor / 1e12 / report["matmul_tflops"], 3)}}
            rows["floor, sustained"] = {"best_s": round(floor / 1e12 / report["matmul_sustained_tflops"], 3)}
            report["results"].append({"size": name, "variants": rows})
            for key, build in variants.items():
                try:
                    row = measure_alone(build, latent, tensors, widths, device, dtype, options.repeat)
                except (torch.OutOfMemoryError, OutOfMemory) as error:
                    row = {"error": str(error).split(". ")[0]}
                if row is None:
                    continue
                rows[key] = row
                if rank == 0:
                    print(name, key, row, flush=True)
                    write(report, options.out)  # an interrupted run keeps its rows
    if dist.is_initialized():
        dist.destroy_process_group()


def measure_alone(
    build: Callable,
    latent: Tensor,
    tensors: dict,
    widths: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    repeat: int,
) -> dict | None:
    """Measure one variant, alone on the device. Returns None if it is not installed."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    decode = build(tensors, widths, device, dtype)
    if decode is None:
        return None
    row = measure(device, partial(decode, latent), repeat)
    if isinstance(decode, Ours):
        row |= {"load_s": decode.load_s, "tail_ms": decode.tail_ms, "exchange_share": decode.held_share}
        decode.engine.release()
    return {key: largest(value) for key, value in row.items()}


def largest(value: float) -> float:
    """Return the largest of all ranks' values. A collective."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def is_wanted(name: str, words: str) -> bool:
    """Return whether a variant's name contains one of the comma-separated words of `--variants`, if there are any."""
    return not words or any(word in name for word in words.split(",") if word)


def versions() -> str:
    """Return the versions of torch, diffusers, transformers and ComfyUI, as far as they are installed."""
    found = {"torch": torch.__version__}
    for name in ("diffusers", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    with contextlib.suppress(FileNotFoundError):
        found["ComfyUI"] = runpy.run_path(str(COMFYUI / "comfyui_version.py"))["__version__"]
    return ", ".join(f"{name} {version}" for name, version in found.items())


def write(report: dict, folder: Path) -> None:
    """Write the report as JSON and as a Markdown table."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{report['machine'].replace(' ', '-').lower()}-x{report['ranks']}"
    name = "".join(c for c in name if c.isalnum() or c in "-_")
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        f"### {report['machine']}, {report['ranks']} rank(s), {report['dtype']}, {report['date']}",
        "",
        f"{report['versions']}; matrix product {report['matmul_tflops']} TFLOP/s, "
        f"{report['matmul_sustained_tflops']} sustained. `{report['command']}`",
        "",
        "| size | variant | seconds | over floor | peak GiB | first call | weights | after last kernel | in exchange |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in report["results"]:
        floor = result["variants"]["floor"]["best_s"]
        for key, row in result["variants"].items():
            if "error" in row:
                lines.append(f"| {result['size']} | {key} | {row['error']} | | | | | | |")
                continue
            ratio = f"{row['best_s'] / floor:.2f}" if floor else ""
            tail = f"{row['tail_ms']} ms" if "tail_ms" in row else ""
            share = f"{row['exchange_share']:.1%}" if row.get("exchange_share") else ""
            cells = *(row.get(name, "") for name in ("peak_gib", "first_s", "load_s")), tail, share
            lines.append(
                f"| {result['size']} | {key} | {row['best_s']} | {ratio} | " + " | ".join(map(str, cells)) + " |"
            )
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
