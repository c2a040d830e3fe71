"""How ranks share a denoising step: guidance first, then the sequence. Pure functions of sizes.

A step has one branch without guidance and two with it: the transformer's forward with the prompt and with the
negative prompt. The ranks of a branch divide its video tokens, and for attention its heads (Ulysses); each holds all
of the text. Parts are uneven where sizes do not divide, as in `torch.tensor_split`: nothing is padded, and every rank
knows all sizes without asking.

With two branches there are two ways to use the ranks, and `plan` takes the cheaper by the counted cost below:

- *halves*: each branch has its own ranks. Little is exchanged, and with one rank per branch nothing at all. With an odd
  number of ranks the smaller half bounds the step.
- *in turn*: all ranks compute one branch after the other. No rank idles, but parts get smaller and more is exchanged.

Even numbers of ranks take halves. With 3 and 5 ranks halves of 1 + 2 and 2 + 3 would be as slow as 2 and 4 ranks, and
computing in turn wins (3 ranks: 0.71 to 0.74 of one forward's time instead of 1). With 7 ranks attention is bounded by
3 of 16 heads twice in turn or by 6 once in halves of 3 + 4, which is the same, and the linear layers decide: 2/7 of the
tokens in turn are less than 1/3.

More ranks than heads: the ranks beyond the last head have no part in attention, but keep their share of everything
else. More ranks than tokens: the last ranks have no tokens.
"""

from dataclasses import dataclass

FLOPS_PER_BYTE = 4000
"""Cost of sending a byte, in FLOPs: an H100's 600 TFLOP/s over the 147 GB/s that an all-to-all moves by NVLink."""


@dataclass(frozen=True)
class Exchange:
    """Split sizes of one `all_to_all_single`, in numbers: what goes to each rank, and what comes from each."""

    send: tuple[int, ...]
    receive: tuple[int, ...]

    @property
    def reverse(self) -> "Exchange":
        """The exchange that brings everything back."""
        return Exchange(self.receive, self.send)


@dataclass(frozen=True)
class Split:
    """How ranks share the forward of one branch. tokens, heads: how many each of `ranks` has, in order."""

    ranks: tuple[int, ...]
    tokens: tuple[int, ...]
    heads: tuple[int, ...]

    def token_range(self, index: int) -> range:
        """Video tokens of the rank at this place in `ranks`."""
        return _range(self.tokens, index)

    def head_range(self, index: int) -> range:
        """Attention heads of the rank at this place in `ranks`."""
        return _range(self.heads, index)

    def exchange(self, index: int, head_dim: int) -> Exchange:
        """From this rank's tokens with all heads, ordered by the rank that they go to, to all tokens with its heads."""
        own_tokens, own_heads = self.tokens[index], self.heads[index]
        return Exchange(
            tuple(own_tokens * heads * head_dim for heads in self.heads),
            tuple(tokens * own_heads * head_dim for tokens in self.tokens),
        )


@dataclass(frozen=True)
class Layout:
    """The branches of a step, the prompt's first. Two branches with the same ranks are computed in turn."""

    branches: tuple[Split, ...]

    def of(self, rank: int) -> tuple[int, ...]:
        """Branches that this rank computes, in order."""
        return tuple(i for i, split in enumerate(self.branches) if rank in split.ranks)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Sets of ranks that exchange with each other, each once."""
        return tuple(dict.fromkeys(split.ranks for split in self.branches))


def parts(total: int, count: int) -> tuple[int, ...]:
    """Sizes of `count` parts of `total`, as `torch.tensor_split` makes them: the first ones are longer by one."""
    size, longer = divmod(total, count)
    return tuple(size + (i < longer) for i in range(count))


def plan(ranks: int, branches: int, tokens: int, heads: int, head_dim: int = 128) -> Layout:
    """The cheapest layout of a step on ranks 0 to `ranks` - 1. Raises ValueError for sizes that cannot be.

    branches: 1, or 2 with guidance. tokens: video tokens of one forward.
    """
    for name, value in (("ranks", ranks), ("tokens", tokens), ("heads", heads), ("head_dim", head_dim)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if branches not in (1, 2):
        raise ValueError(f"branches is {branches}; a step has 1, or 2 with guidance.")

    def split(first: int, count: int) -> Split:
        return Split(tuple(range(first, first + count)), parts(tokens, count), parts(heads, count))

    in_turn = Layout((split(0, ranks),) * branches)
    if branches == 1 or ranks == 1:
        return in_turn
    larger = ranks - ranks // 2
    halves = Layout((split(0, larger), split(larger, ranks // 2)))
    return min(halves, in_turn, key=lambda layout: cost(layout, head_dim))


def cost(layout: Layout, head_dim: int) -> int:
    """FLOPs of one block on the busiest rank, what it sends counted as FLOPs too; the text is left out.

    Per token, a block's linear layers take 24 width^2 (4 in attention, 8 in the MLP, each multiply and add), and
    attention 4 x tokens x head_dim per head. Query, key, value and result travel in two bytes per number.
    """

    def of_rank(split: Split, index: int) -> int:
        tokens, heads, width = sum(split.tokens), split.heads[index], sum(split.heads) * head_dim
        linear = 24 * width**2 * split.tokens[index]
        attention = 4 * tokens**2 * head_dim * heads
        sent = 3 * split.tokens[index] * (width - heads * head_dim) + (tokens - split.tokens[index]) * heads * head_dim
        return linear + attention + FLOPS_PER_BYTE * 2 * sent

    work: dict[int, int] = {}
    for split in layout.branches:
        for index, rank in enumerate(split.ranks):
            work[rank] = work.get(rank, 0) + of_rank(split, index)
    return max(work.values())


def _range(sizes: tuple[int, ...], index: int) -> range:
    start = sum(sizes[:index])
    return range(start, start + sizes[index])
