"""Ranks that share forwards of a small transformer, case by case: what `test_denoise_share` starts."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.denoise.conditions import trim
from distributed.denoise.parallel import Layout, Split, plan
from distributed.denoise.share import Share, Wait, window_elements
from distributed.denoise.transformer import Transformer
from distributed.denoise.window import Window
from tests.unit.denoise_models import make_inputs, make_model

WORLD = 8
TEXTS = ((5, 2), (9, 0))
"""Valid tokens of text and glyphs, for each branch."""
MOST_TEXT = 24
"""Text, glyph and image tokens of a branch, at the most."""


@dataclass(frozen=True)
class Case:
    """in_turn: all ranks compute both branches. lost: the rank whose tokens never reach the others.

    windows: whether ranks write into each other's memory.
    """

    ranks: int
    branches: int = 1
    heads: int = 6
    latent: tuple[int, int, int] = (3, 5, 7)
    in_turn: bool = False
    lost: int | None = None
    windows: bool = False

    @property
    def layout(self) -> Layout:
        tokens = self.latent[0] * self.latent[1] * self.latent[2]
        if self.in_turn:
            return Layout((Split.of(tuple(range(self.ranks)), tokens, self.heads),) * self.branches)
        return plan(self.ranks, self.branches, tokens, self.heads, head_dim=16)

    @property
    def name(self) -> str:
        return "-".join(map(str, vars(self).values())).replace(" ", "")


CASES = [Case(ranks) for ranks in (1, 2, 3, 4, 6, 8)]
CASES += [Case(1, 2), *(Case(ranks, 2, in_turn=in_turn) for ranks in (2, 3, 4, 5, 8) for in_turn in (False, True))]
CASES += [Case(1, heads=8), Case(8, heads=8), Case(4, heads=2), Case(1, heads=2)]
CASES += [Case(4, latent=(1, 1, 3)), Case(1, latent=(1, 1, 3))]
CASES += [replace(case, windows=True) for case in CASES if case.ranks > 1]
LOST = [Case(2, lost=1), Case(6, lost=5), Case(6, lost=0), Case(2, lost=1, windows=True)]


class Losing(Share):
    """Sends zeros instead of this rank's queries, keys and values."""

    def scatter_heads(self, x: Tensor, out: Tensor) -> Wait:
        return super().scatter_heads(torch.zeros_like(x), out)

    def gather_rows(self, x: Tensor) -> Wait:
        x[self.tokens] = 0
        return super().gather_rows(x)


def open_window(case: Case, split: Split, group: dist.ProcessGroup, folder: Path) -> Window:
    """Return a window of buffers in files, full of NaN. Half of the ranks dawdle when all have sent.

    So the others write again while these still read.
    """
    ranks, elements = split.ranks, window_elements(split, MOST_TEXT, dim=16)
    paths = [folder / f"{case.name}.{'-'.join(map(str, ranks))}.window.{rank}" for rank in ranks]
    index = ranks.index(dist.get_rank())
    torch.from_file(str(paths[index]), shared=True, size=elements).fill_(torch.nan)
    dist.barrier(group)

    def barrier() -> None:
        dist.barrier(group)
        time.sleep(0.002 * (index % 2))

    return Window([torch.from_file(str(path), shared=True, size=elements) for path in paths], index, barrier)


@torch.inference_mode()
def run(case: Case, rank: int, folder: Path) -> None:
    """Compute this rank's part of the case, and write the rows of each branch to a file."""
    layout = case.layout
    groups = {ranks: dist.new_group(ranks) if len(ranks) > 1 else None for ranks in layout.groups}
    windows = {
        split.ranks: open_window(case, split, groups[split.ranks], folder)
        for split in dict.fromkeys(layout.branches)
        if case.windows and groups[split.ranks] is not None and rank in split.ranks
    }
    model = make_model(num_attention_heads=case.heads, num_layers=2)
    transformer = Transformer(model)
    for branch in layout.of(rank):
        text, glyphs = TEXTS[branch]
        inputs = make_inputs(model, latent=case.latent, text=(text,), glyphs=(glyphs,))
        masked = (inputs[f"encoder_{part}"] for part in ("hidden_states", "attention_mask"))
        masked_2 = (inputs[f"encoder_{part}_2"] for part in ("hidden_states", "attention_mask"))
        context = transformer.encode(trim(*masked, *masked_2, inputs["image_embeds"])[0])
        (modulation,) = transformer.modulation(inputs["timestep"])
        split = layout.branches[branch]
        kind, ranks = Losing if rank == case.lost else Share, split.ranks
        share = kind(split, ranks.index(rank), groups[ranks], windows.get(ranks))
        rows = transformer.forward(inputs["hidden_states"][0], inputs["timestep"], context, modulation, share)
        torch.save(rows, folder / f"{case.name}.{branch}.{rank}")


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    for case in CASES + LOST:
        run(case, rank, folder)
    dist.destroy_process_group()
