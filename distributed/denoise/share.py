"""One rank's share of a branch: its tokens and heads, and their exchange with the other ranks.

Attention needs all tokens of a head. Before attention each rank sends the queries, keys and values of its tokens to the
ranks that compute their heads, and afterwards it receives the results (Ulysses). Values are sent first, while keys and
queries are computed. The received data is in token order, so it is received directly into the input of attention.

With a window, ranks write into each other's memory; without one, they use collectives. In a window the inputs of
attention are at the start and the results at the end. Between two exchanges into one of these places there is one into
the other, which a rank completes only after it has read what the first one brought. So nothing is overwritten too soon.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from .parallel import Exchange, Split
from .window import Window

Wait = Callable[[], object]
"""Waits for a transfer: work launched after the call may use its result."""


INPUTS = 3
"""Inputs of attention: values, keys and queries."""


def window_elements(split: Split, text: int, dim: int) -> int:
    """Return the number of elements that a window needs for a forward. text: the number of text tokens."""
    inputs = INPUTS * (sum(split.tokens) + text) * max(split.heads)
    return (inputs + (max(split.tokens) + text) * sum(split.heads)) * dim


@lru_cache(maxsize=32)
def _exchanges(split: Split, dim: int) -> tuple[Exchange, ...]:
    """Return the exchange of each rank that sends its tokens: the same in all blocks."""
    return tuple(split.exchange(index, dim) for index in range(len(split.ranks)))


class Share:
    """The share of the rank at `index` of a split.

    group: the process group of its ranks; None for a single rank. window: of this group, with at least
    `window_elements`; None: collectives are used.
    """

    def __init__(
        self,
        split: Split,
        index: int = 0,
        group: dist.ProcessGroup | None = None,
        window: Window | None = None,
    ) -> None:
        if (group is None) != (len(split.ranks) == 1):
            raise ValueError(
                f"A split of {len(split.ranks)} ranks needs {'no group' if group else 'a group'}; group is {group}."
            )
        self.split, self.group, self.window = split, group, window
        self.ranks = len(split.ranks)
        tokens, heads = split.token_range(index), split.head_range(index)
        self.tokens, self.heads = slice(tokens.start, tokens.stop), slice(heads.start, heads.stop)
        self._index = index

    @property
    def total_tokens(self) -> int:
        """Number of video tokens of all ranks."""
        return sum(self.split.tokens)

    def input(self, number: int, text: int, x: Tensor) -> Tensor:
        """Return memory for an input of attention, [all tokens + text, own heads, dim], with undefined values.

        number: which input, from 0. text: number of text tokens. x: [own tokens, all heads, dim], for dim and dtype.
        Raises ValueError if the window is too small for the forward.
        """
        heads, dim, rows = self.split.heads[self._index], x.shape[-1], self.total_tokens + text
        needed = window_elements(self.split, text, dim)
        if self.window is not None and len(self.window.own) < needed:
            raise ValueError(f"The window has {len(self.window.own)} elements; the forward needs {needed}.")
        start = number * rows * max(self.split.heads) * dim
        return self._memory(x, start, rows * heads * dim).view(rows, heads, dim)

    def scatter_heads(self, x: Tensor, out: Tensor) -> Wait:
        """Send this rank's tokens, in the order of `fused.place_heads`, and receive all tokens of its heads in `out`.

        out: [all tokens, own heads, dim], the start of an `input`.
        """
        return self._exchange(x.view(-1), out.view(-1), _exchanges(self.split, out.shape[-1]))

    def gather_heads(self, x: Tensor) -> Callable[[], Tensor]:
        """Send the results of own heads, [all tokens, own heads, dim], and receive all heads of this rank's tokens.

        Returns a function that waits for them and returns them, [own tokens, heads * dim].
        """
        if self.group is None:
            return lambda: x.flatten(1)
        exchanges = [exchange.reverse for exchange in _exchanges(self.split, x.shape[-1])]
        own, most = self.split.tokens[self._index], max(self.split.tokens)
        return self._gather(x.reshape(-1), exchanges, own, x.shape[-1], most)

    def gather_text(self, x: Tensor) -> Callable[[], Tensor]:
        """Gather all heads of the text, x [tokens, own heads, dim], as `gather_heads` does: [tokens, heads * dim]."""
        if self.group is None:
            return lambda: x.flatten(1)
        tokens, _, dim = x.shape
        sizes = tuple(tokens * heads * dim for heads in self.split.heads)
        exchanges = [Exchange((size,) * self.ranks, sizes) for size in sizes]
        return self._gather(x.reshape(-1).repeat(self.ranks), exchanges, tokens, dim, max(self.split.tokens) + tokens)

    def _gather(
        self, x: Tensor, exchanges: Sequence[Exchange], rows: int, dim: int, before_end: int
    ) -> Callable[[], Tensor]:
        """Exchange rows, of which each rank sends the columns of its heads, into a window's last `before_end` rows."""
        sizes = exchanges[self._index].receive
        out = self._memory(x, -before_end * sum(self.split.heads) * dim, sum(sizes))
        wait = self._exchange(x, out, exchanges)

        def result() -> Tensor:
            wait()
            of_ranks = zip(out.split(sizes), self.split.heads, strict=True)
            return torch.cat([part.view(rows, heads * dim) for part, heads in of_ranks], dim=1)

        return result

    def _memory(self, x: Tensor, start: int, elements: int) -> Tensor:
        """Return memory to receive in: new, or the window's from element `start` on, counted from the end if < 0."""
        if self.window is None:
            return x.new_empty(elements)
        start %= len(self.window.own)
        return self.window.own[start : start + elements]

    def _exchange(self, x: Tensor, out: Tensor, exchanges: Sequence[Exchange]) -> Wait:
        """Send parts of x, and receive parts in `out`, which is at the same place of the window on all ranks.

        exchanges: of all ranks.
        """
        own = exchanges[self._index]
        if self.window is None:
            sizes = list(own.receive), list(own.send)
            return dist.all_to_all_single(out, x, *sizes, group=self.group, async_op=True).wait
        start = out.storage_offset() - self.window.own.storage_offset()
        starts = [start + sum(exchange.receive[: self._index]) for exchange in exchanges]
        self.window.send(x, zip(range(self.ranks), starts, x.split(own.send), strict=True))
        return self.window.complete
