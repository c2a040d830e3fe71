"""Predict the scaling of the seamless decode to more ranks than there are devices.

    python -m benchmarks.predict

The compute time is measured: one device decodes one rank's share, the largest region of the division, with its windows,
its steps in flight and attention to the whole picture, but without exchanging borders. The traffic is counted in bytes
and messages and converted to seconds with a given bandwidth and latency. A prediction is a range: compute plus the
exchange of keys and values, with all of the border traffic hidden behind compute, or with none of it.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.decode import SIZES, machine, measure, target
from benchmarks.random_weights import decoder_tensors, random_latent
from distributed.vae.halo import IN_FLIGHT
from distributed.vae.hunyuanvideo15.decoder import Tail, Trunk, split
from distributed.vae.hunyuanvideo15.weights import Weights
from distributed.vae.plan import choose_plan
from distributed.vae.regions import divide, whole

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class CountedEdges:
    """A fake of the other ranks that counts the traffic and sends nothing."""

    positions: int
    sides: tuple[int, int]
    """Number of vertical and of horizontal neighbours of the rank in the middle of the division."""
    border_bytes: int = 0
    border_messages: int = 0
    gathered_bytes: int = 0
    gathers: int = 0
    in_flight: int = IN_FLIGHT

    def start(self, window: Tensor) -> "CountedEdges":
        for dim, neighbours in zip((1, 2), self.sides, strict=True):
            self.border_bytes += neighbours * window.select(dim, 0).numel() * window.element_size()
            self.border_messages += neighbours > 0
        return self

    def finish(self) -> None: ...

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        own = keys.shape[1]
        self.gathered_bytes += 2 * (self.positions - own) * keys.shape[0] * keys.shape[2] * keys.element_size()
        self.gathers += 1
        repeats = -(-self.positions // own)
        return tuple(t.repeat(1, repeats, 1)[:, : self.positions] for t in (keys, values))


def share(weights: Weights, size: tuple[int, int, int], ranks: int, device: torch.device) -> tuple[dict, CountedEdges]:
    """Measure the largest region of `ranks` on one device. Returns its row and the counted traffic."""
    time, height, width = size
    division = divide(height, width, ranks)
    region = division.largest
    sides = min(2, division.rows - 1), min(2, division.columns - 1)
    own = region.height, region.width
    plan, planned = choose_plan(weights, own, (height, width), time, ranks > 1, 2**60)
    latent = random_latent(time, *own, weights.latent_channels).to(device, weights.dtype)
    edges = CountedEdges(height * width, sides)

    def decode() -> None:
        edges.border_bytes = edges.border_messages = edges.gathered_bytes = edges.gathers = 0
        given = edges if ranks > 1 else None
        trunk = Trunk(weights, *own, time, given)
        tail = Tail(weights, whole(*own, weights.convs), plan.steps, given)
        for _ in tail.run(trunk.run(split(latent, plan.steps.trunk))):
            pass

    return measure(device, decode, 1) | {"planned_gib": round(planned / 2**30, 2)}, edges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default=None, help="comma-separated, of: " + ", ".join(SIZES))
    parser.add_argument("--ranks", default="1,2,4,8")
    parser.add_argument("--bandwidth", type=float, default=150e9, help="bytes a second into one device")
    parser.add_argument("--latency", type=float, default=40e-6, help="seconds of one exchange")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    device, dtype, widths = target(0)
    sizes = (options.sizes or ("64x96x9" if device.type == "cpu" else "480x848x121,720x1280x121,1080x1920x121")).split(
        ","
    )
    report = {"machine": machine(device), "bandwidth": options.bandwidth, "latency": options.latency, "predictions": []}
    with torch.inference_mode():
        weights = Weights(decoder_tensors(widths, device), device, dtype)
        for size in sizes:
            single = None
            for ranks in map(int, options.ranks.split(",")):
                row, edges = share(weights, SIZES[size], ranks, device)
                borders = edges.border_bytes / options.bandwidth + edges.border_messages * options.latency
                gathers = edges.gathered_bytes / options.bandwidth + edges.gathers * options.latency
                best, worst = row["best_s"] + gathers, row["best_s"] + gathers + borders
                single = single or row["best_s"]
                report["predictions"].append(
                    {
                        "size": size,
                        "ranks": ranks,
                        "compute_s": row["best_s"],
                        "peak_gib": row.get("peak_gib"),
                        "planned_gib": row["planned_gib"],
                        "border_mb": round(edges.border_bytes / 1e6, 1),
                        "border_messages": edges.border_messages,
                        "gathered_mb": round(edges.gathered_bytes / 1e6, 1),
                        "predicted_s": [round(best, 3), round(worst, 3)],
                        "predicted_speedup": [round(single / worst, 2), round(single / best, 2)],
                    }
                )
                print(report["predictions"][-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "predicted-scaling.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
