"""The division of a denoising step between ranks: first by guidance branch, then by sequence. Pure functions of sizes.

A step has one branch without guidance and two with guidance: the transformer's forward with the prompt and with the
negative prompt. The ranks of a branch divide its video tokens. Each rank holds all text tokens. If a size is not
divisible, parts are uneven, as in `torch.tensor_split`. Nothing is padded, and every rank can compute all sizes.

For attention, more than two ranks divide the heads (Ulysses): each sends queries, keys and values to the ranks that
compute their heads, and the results come back. Two ranks gather keys and values instead, and each attends with the
queries of its own tokens. Two ranks send the same number of bytes either way, but keys and values travel while the next
input of attention is computed, and no result travels. More ranks would send more bytes than with Ulysses.

With two branches there are two layouts, and `plan` chooses the one with the lower `cost`:

- *halves*: each branch has its own ranks. Little is exchanged, and with one rank per branch nothing. With an odd number
  of ranks the smaller half determines the time.
- *in turn*: all ranks compute one branch after the other. No rank idles, but parts are smaller and more is exchanged.

Even numbers of ranks use halves. With 3 and 5 ranks, halves of 1 + 2 and 2 + 3 would be as slow as 2 and 4 ranks, so
the branches are computed in turn (3 ranks: 0.71 to 0.74 of one forward's time instead of 1). With 7 ranks the attention
costs the same, 3 of 16 heads twice in turn or 6 heads once in halves of 3 + 4, so the linear layers decide: in turn a
rank computes 2/7 of the tokens, which is less than 1/3.

If there are more ranks than heads, the surplus ranks compute no attention, but their share of everything else. If there
are more ranks than tokens, the last ranks have no tokens.
"""

from dataclasses import dataclass

GATHERING = 2
"""Ranks of a branch, at the most, that gather keys and values."""
FLOPS_PER_BYTE = 4000
"""Cost of sending a byte, in FLOPs: 600 TFLOP/s over 147 GB/s, the rates of an H100 and of an all-to-all on NVLink."""


@dataclass(frozen=True)
class Exchange:
    """Split sizes of one `all_to_all_single`: numbers of elements sent to and received from each rank."""

    send: tuple[int, ...]
    receive: tuple[int, ...]

    @property
    def reverse(self) -> "Exchange":
        """The exchange in the opposite direction."""
        return Exchange(self.receive, self.send)


@dataclass(frozen=True)
class Split:
    """The division of one branch's forward. tokens, heads: the number of each that each of `ranks` has, in order.

    Ranks that gather keys and values have all heads.
    """

    ranks: tuple[int, ...]
    tokens: tuple[int, ...]
    heads: tuple[int, ...]

    @classmethod
    def of(cls, ranks: tuple[int, ...], tokens: int, heads: int) -> "Split":
        """Divide this number of tokens and heads between ranks."""
        gathers = len(ranks) <= GATHERING
        return cls(ranks, parts(tokens, len(ranks)), (heads,) * len(ranks) if gathers else parts(heads, len(ranks)))

    @property
    def gathers(self) -> bool:
        """Whether the ranks gather keys and values. A single rank has nothing to exchange."""
        return len(self.ranks) <= GATHERING

    @property
    def total_heads(self) -> int:
        """The number of heads of the transformer."""
        return self.heads[0] if self.gathers else sum(self.heads)

    def token_range(self, index: int) -> range:
        """Return the video tokens of the rank at this index of `ranks`."""
        return _range(self.tokens, index)

    def head_range(self, index: int) -> range:
        """Return the attention heads of the rank at this index of `ranks`."""
        return range(self.heads[0]) if self.gathers else _range(self.heads, index)

    def exchange(self, index: int, head_dim: int) -> Exchange:
        """Return the exchange that sends this rank's tokens of all heads and receives all tokens of its heads.

        For ranks that divide the heads.
        """
        own_tokens, own_heads = self.tokens[index], self.heads[index]
        return Exchange(
            tuple(own_tokens * heads * head_dim for heads in self.heads),
            tuple(tokens * own_heads * head_dim for tokens in self.tokens),
        )


@dataclass(frozen=True)
class Layout:
    """The branches of a step, first the prompt's. Branches with the same ranks are computed in turn."""

    branches: tuple[Split, ...]

    def of(self, rank: int) -> tuple[int, ...]:
        """Return the branches that this rank computes, in order."""
        return tuple(i for i, split in enumerate(self.branches) if rank in split.ranks)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The distinct sets of ranks that communicate with each other."""
        return tuple(dict.fromkeys(split.ranks for split in self.branches))


def parts(total: int, count: int) -> tuple[int, ...]:
    """Return the sizes of `count` parts of `total`, as in `torch.tensor_split`: the first ones may be larger by one."""
    size, longer = divmod(total, count)
    return tuple(size + (i < longer) for i in range(count))


def plan(ranks: int, branches: int, tokens: int, heads: int, head_dim: int = 128) -> Layout:
    """Return the cheapest layout of a step on ranks 0 to `ranks` - 1. Raises ValueError for invalid sizes.

    branches: 1, or 2 with guidance. tokens: video tokens of one forward.
    """
    for name, value in (("ranks", ranks), ("tokens", tokens), ("heads", heads), ("head_dim", head_dim)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if branches not in (1, 2):
        raise ValueError(f"branches is {branches}; a step has 1, or 2 with guidance.")

    def split(first: int, count: int) -> Split:
        return Split.of(tuple(range(first, first + count)), tokens, heads)

    in_turn = Layout((split(0, ranks),) * branches)
    if branches == 1 or ranks == 1:
        return in_turn
    larger = ranks - ranks // 2
    halves = Layout((split(0, larger), split(larger, ranks // 2)))
    return min(halves, in_turn, key=lambda layout: cost(layout, head_dim))


def cost(layout: Layout, head_dim: int) -> int:
    """Return the cost of one block on the busiest rank in FLOPs, including its communication but not the text.

    Per token, a block's linear layers need 24 width^2 FLOPs (4 width^2 multiply-adds in attention, 8 in the MLP), and
    attention 4 x tokens x head_dim per head. What is sent has two bytes per element: keys and values, or query, key,
    value and result.
    """

    def of_rank(split: Split, index: int) -> int:
        tokens, own = sum(split.tokens), split.tokens[index]
        width, own_width = split.total_heads * head_dim, split.heads[index] * head_dim
        linear = 24 * width**2 * own
        if split.gathers:
            attention, sent = 4 * own * tokens * width, 2 * own * width * (len(split.ranks) - 1)
        else:
            attention, sent = 4 * tokens**2 * own_width, 3 * own * (width - own_width) + (tokens - own) * own_width
        return linear + attention + FLOPS_PER_BYTE * 2 * sent

    work: dict[int, int] = {}
    for split in layout.branches:
        for index, rank in enumerate(split.ranks):
            work[rank] = work.get(rank, 0) + of_rank(split, index)
    return max(work.values())


def _range(sizes: tuple[int, ...], index: int) -> range:
    start = sum(sizes[:index])
    return range(start, start + sizes[index])
