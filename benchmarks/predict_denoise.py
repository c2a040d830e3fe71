"""Predict the scaling of a denoising step to more ranks than there are devices.

    python -m benchmarks.predict_denoise

The compute time is measured: one device computes the share of the rank with the most tokens and heads, with its part of
every attention, but without exchanging anything. The traffic is counted in bytes and messages and converted to seconds
with a given bandwidth and latency. A prediction is a range: with all of the traffic hidden behind compute, or with none
of it. `--branches 2` is a step with guidance. Weights are random; without a GPU the run is a functional test.
"""

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from torch import Tensor

from benchmarks.decode import ROOT, SIZES, machine, measure
from benchmarks.denoise import FULL, SMALL, Inputs, random_weights
from distributed.denoise.conditions import Condition
from distributed.denoise.parallel import Exchange, Split, plan
from distributed.denoise.share import Share
from distributed.denoise.transformer import Transformer


class CountedShare(Share):
    """A rank's share that counts the traffic and sends nothing: what other ranks would send has undefined values."""

    def __init__(self, split: Split, index: int) -> None:
        super().__init__(split, index, object() if len(split.ranks) > 1 else None)
        self.received = self.exchanges = 0

    def _exchange(self, x: Tensor, out: Tensor, exchanges: Sequence[Exchange]) -> Callable:
        receive = exchanges[self._index].receive
        return self._count(sum(receive) - receive[self._index], x)

    def gather_rows(self, x: Tensor) -> Callable:
        others = self.total_tokens - self.split.tokens[self._index]
        return self._count(others * x[0].numel(), x) if self.group else super().gather_rows(x)

    def _count(self, elements: int, x: Tensor) -> Callable:
        self.exchanges += 1
        self.received += elements * x.element_size()
        return lambda: None


def predict(transformer: Transformer, inputs: Inputs, ranks: int, branches: int, options: argparse.Namespace) -> dict:
    """Return the row of one number of ranks, without its speed-up."""
    t, h, w = transformer.grid(inputs.latent)
    layout = plan(ranks, branches, t * h * w, transformer.heads, transformer.head_dim)
    busiest = max(range(ranks), key=lambda rank: work(layout, rank))
    shares = [
        CountedShare(split, split.ranks.index(busiest))
        for split in (layout.branches[branch] for branch in layout.of(busiest))
    ]
    context = transformer.encode(Condition(inputs.text, inputs.glyphs, inputs.image))

    def step() -> None:
        (modulation,) = transformer.modulation(inputs.timestep)
        for share in shares:
            share.received = share.exchanges = 0
            transformer.forward(inputs.latent, inputs.timestep, context, modulation, share).cpu()

    row = measure(inputs.latent.device, step, options.repeat)
    received, exchanges = sum(share.received for share in shares), sum(share.exchanges for share in shares)
    traffic = received / options.bandwidth + exchanges * options.latency
    return {
        "ranks": ranks,
        "branches": branches,
        "compute_s": row["best_s"],
        "peak_gib": row.get("peak_gib"),
        "received_mb": round(received / 1e6, 3),
        "exchanges": exchanges,
        "predicted_s": [round(row["best_s"], 3), round(row["best_s"] + traffic, 3)],
    }


def work(layout: object, rank: int) -> int:
    """Return a number that is larger for a rank with more tokens and heads in all of its branches."""
    splits = [layout.branches[branch] for branch in layout.of(rank)]
    return sum(split.tokens[split.ranks.index(rank)] * 100 + split.heads[split.ranks.index(rank)] for split in splits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default=None, help="comma-separated, of: " + ", ".join(SIZES))
    parser.add_argument("--ranks", default="1,2,4,8")
    parser.add_argument("--branches", default="1,2")
    parser.add_argument("--bandwidth", type=float, default=147e9, help="bytes a second into one device")
    parser.add_argument("--latency", type=float, default=40e-6, help="seconds of one exchange")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype, config = (torch.bfloat16, FULL) if cuda else (torch.float32, SMALL)
    sizes = (options.sizes or ("480x848x33,480x848x121,720x1280x121" if cuda else "64x96x9")).split(",")
    report = {
        "machine": machine(device),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "bandwidth": options.bandwidth,
        "latency": options.latency,
        "predictions": [],
    }
    with torch.inference_mode():
        with torch.device("meta"):
            model = HunyuanVideo15Transformer3DModel(**config)
        transformer = Transformer(random_weights(model, device, dtype))
        for size in sizes:
            inputs = Inputs(model.config, SIZES[size], device, dtype)
            for branches in map(int, options.branches.split(",")):
                alone = None
                for ranks in map(int, options.ranks.split(",")):
                    row = predict(transformer, inputs, ranks, branches, options)
                    alone = alone or row["compute_s"]
                    row["predicted_speedup"] = [round(alone / seconds, 2) for seconds in reversed(row["predicted_s"])]
                    report["predictions"].append({"size": size, **row})
                    print(report["predictions"][-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "predicted-denoising.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
