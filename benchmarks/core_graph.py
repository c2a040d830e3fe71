"""Measure decodes in a graph of ComfyUI's own nodes: with core's VAE, and with the same VAE through Distribute VAE.

    python -m benchmarks.core_graph

A ComfyUI process (COMFYUI_PATH, or .comfyui) loads a full-size VAE file with random weights and decodes a series of
latents: with core's decoder, on one rank, on all GPUs, and with core's decoder again. The series shows whether one kind
of decode slows down the next. Each row has the seconds of the VAE Decode node, and the memory in use on each GPU before
the prompt, at the peak, and after it. The last row is measured after `POST /free`. Without a GPU the latent is small
and the run is only a functional test. Writes JSON and a Markdown table.
"""

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.decode import ROOT, SIZES, machine, target, versions
from benchmarks.random_weights import random_latent
from distributed.vae.hunyuanvideo15.layout import to_core

sys.path.append(str(ROOT / "scripts"))
from comfyui_host import Host, Run, node

POLL_MS = 200


def save_vae(path: Path, device: torch.device) -> None:
    """Write a VAE with encoder and decoder, random float16 weights, in core's layout."""
    from diffusers import AutoencoderKLHunyuanVideo15

    with device:
        vae = AutoencoderKLHunyuanVideo15()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({to_core(key): value.half().cpu().contiguous() for key, value in vae.state_dict().items()}, path)


def graph(latent: str, devices: str | None) -> dict:
    """Return a prompt that decodes `latent` with core's VAE, on ranks if `devices` is given, and saves one frame."""
    prompt = {
        "latent": node("LoadLatent", latent=latent),
        "vae": node("VAELoader", vae_name="full.safetensors"),
        "decode": node("VAEDecode", samples=["latent", 0], vae=["vae", 0]),
        "one": node("ImageFromBatch", image=["decode", 0], batch_index=0, length=1),
        "save": node("SaveImage", images=["one", 0], filename_prefix="frame"),
    }
    if devices:
        options = {"backend": "auto", "dtype": "auto", "keep_loaded": "keep", "start_timeout": 180}
        prompt["ranks"] = node("HV15RankGroup", devices=devices, stall_timeout=120, **options)
        settings = {"mode": "seamless", "tile_size": 256, "overlap": 64}
        prompt["distributed"] = node("HV15DistributeVAE", vae=["vae", 0], rank_group=["ranks", 0], **settings)
        prompt["decode"]["inputs"]["vae"] = ["distributed", 0]
    return prompt


def memory_in_use() -> list[float]:
    """Return the memory in use on each GPU by all processes, in GiB."""
    if not torch.cuda.is_available():
        return []
    found = subprocess.run(memory_query(), capture_output=True, text=True, check=True).stdout.split()
    return list(map(_gib, found))


def memory_query() -> list[str]:
    """Return a command that prints the memory in use on each visible GPU, in MiB, one per line."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*command, f"--id={visible}"] if visible else command


class Highest:
    """Records the peak memory in use on each GPU while the context is open, in GiB.

    One nvidia-smi runs all the while: starting it again and again slows down the work that is measured.
    """

    def __enter__(self) -> "Highest":
        self.gib, self._process = memory_in_use(), None
        if self.gib:
            command = [*memory_query(), f"--loop-ms={POLL_MS}"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            self._thread = threading.Thread(target=self._watch)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._thread.join()
            self._process.stdout.close()

    def _watch(self) -> None:
        for number, line in enumerate(self._process.stdout):
            gpu = number % len(self.gib)
            self.gib[gpu] = max(self.gib[gpu], _gib(line))


def _gib(mib: str) -> float:
    return round(int(mib) / 1024, 2)


def measure(host: Host, name: str, devices: str | None) -> dict:
    """Run one prompt and return its row. Raises RuntimeError if the prompt fails."""
    before = memory_in_use()
    with Highest() as highest:
        run = run_prompt(host, graph(name, devices))
    after = memory_in_use()
    return {
        "devices": devices or "core",
        "seconds": round(run.seconds["decode"], 2),
        "before_gib": before,
        "highest_gib": highest.gib,
        "after_gib": after,
    }


def run_prompt(host: Host, prompt: dict) -> Run:
    """Run a prompt to its end. Raises RuntimeError if a node fails."""
    run = host.run(prompt, seconds=1200)
    if run.error:
        raise RuntimeError(f"{run.error['node_type']} failed: {run.error['exception_message']}")
    return run


def free(host: Host) -> list[float]:
    """Make ComfyUI unload all models, and return the memory in use on each GPU after 4 seconds."""
    host.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(4)
    return memory_in_use()


@contextlib.contextmanager
def running_host(folder: Path, options: str) -> Iterator[Host]:
    """Yield a ComfyUI with these further options, in one string. Print the end of its log if the measurement fails."""
    host = Host(folder, options=options.split())
    try:
        yield host.wait()
    except BaseException:
        print(host.log.read_text(errors="replace")[-6000:], flush=True)
        raise
    finally:
        host.close()


def parser_for(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the options that the benchmarks of graphs share. doc: the module's docstring."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--sizes", default=None, help="comma-separated, such as 480x848x33,720x1280x121")
    parser.add_argument("--host-options", default="", help="more options for ComfyUI's main.py, as one string")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser


def new_report(command: str, device: torch.device) -> dict:
    """Return a report without rows. command: of the benchmark, to run it again."""
    return {
        "machine": f"{max(1, torch.cuda.device_count())} x {machine(device)}",
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "command": command,
        "rows": [],
    }


def device_lists() -> tuple[str, str]:
    """Return the `devices` of a group of one rank, and of a group of all GPUs, or of two CPU ranks."""
    count = torch.cuda.device_count()
    return ("cuda:0", ",".join(f"cuda:{i}" for i in range(count))) if count else ("cpu", "cpu,cpu")


def main() -> None:
    options = parser_for(__doc__).parse_args()
    device, _, _ = target(0)
    one, every = device_lists()
    series = [None, one, one, every, every, None, every] if every != one else [None, one, one, None, one]
    default = "480x848x33,720x1280x121" if torch.cuda.is_available() else "64x96x9"
    sizes = (options.sizes or default).split(",")
    report = new_report(f"python -m benchmarks.core_graph --sizes {','.join(sizes)}", device)
    with tempfile.TemporaryDirectory(prefix="hv15-core-graph-") as folder:
        save_vae(Path(folder) / "models" / "vae" / "full.safetensors", device)
        torch.cuda.empty_cache()
        with running_host(Path(folder), options.host_options) as host:
            for size in sizes:
                for index, devices in enumerate(series):
                    name = f"{size}-{index}.latent"  # a new name and seed, so that ComfyUI's cache is not used
                    host.save_latent(name, random_latent(1, 32, *SIZES[size], seed=index))
                    report["rows"].append({"size": size, **measure(host, name, devices)})
                    print(report["rows"][-1], flush=True)
                report["rows"].append({"size": size, "devices": "after /free", "after_gib": free(host)})
                print(report["rows"][-1], flush=True)
                write(report, options.out, "core-graph", "seconds of the VAE Decode node, GiB in use on each GPU")


def write(report: dict, folder: Path, name: str, units: str) -> None:
    """Write the report as JSON and as a Markdown table. units: what the columns of the table are."""
    folder.mkdir(parents=True, exist_ok=True)
    name += "-cpu" if not torch.cuda.is_available() else f"-gpu-x{torch.cuda.device_count()}"
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    columns = dict.fromkeys(column for row in report["rows"] for column in row)
    lines = [
        f"### {report['machine']}, {report['versions']}, {report['date']}",
        "",
        f"`{report['command']}`; {units}.",
        "",
        "| " + " | ".join(columns) + " |",
        "| --- " * len(columns) + "|",
        *("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in report["rows"]),
    ]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
