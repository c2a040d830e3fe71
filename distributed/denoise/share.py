"""One rank's share of a branch: its tokens and heads, and their exchange with the other ranks.

Attention needs all tokens of a head. Two ranks send each other the values and keys of their tokens, while the next
input of attention is computed. More ranks send values, keys and queries of their tokens to the ranks that compute their
heads, and afterwards receive the results (Ulysses). `parallel` says why. All data is received directly into the input
of attention, in token order.

With a window, ranks write into each other's memory; without one, they use collectives. In a window the inputs of
attention are at the start and the results at the end. Between two exchanges into one of these places there is one into
the other, which a rank completes only after it has read what the first one brought. So nothing is overwritten too soon.
Two ranks exchange no results, so they call `Window.release` after attention.
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


VALUES, KEYS, QUERIES = INPUTS = range(3)
"""The inputs of attention, in the order in which they are computed."""


def window_elements(split: Split, text: int, dim: int) -> int:
    """Return the number of elements that a window needs for a forward. text: the number of text tokens."""
    if split.gathers:  # keys and values
        return 2 * (sum(split.tokens) + text) * split.total_heads * dim
    inputs = len(INPUTS) * (sum(split.tokens) + text) * max(split.heads)
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
        self.tokens, self.heads = _slice(split.token_range(index)), _slice(split.head_range(index))
        self._index = index

    @property
    def total_tokens(self) -> int:
        """Number of video tokens of all ranks."""
        return sum(self.split.tokens)

    def input(self, number: int, text: int, dim: int, x: Tensor) -> Tensor:
        """Return memory for an input of attention, [tokens + text, own heads, dim], with undefined values.

        number: which of `INPUTS`. text: number of text tokens. x: a tensor of the same dtype and device. The tokens are
        this rank's for the queries of ranks that gather keys and values, otherwise those of all ranks. Raises
        ValueError if the window is too small for the forward.
        """
        heads, rows = self.split.heads[self._index], self.total_tokens + text
        if self.split.gathers and number == QUERIES:
            return x.new_empty(self.split.tokens[self._index] + text, heads, dim)
        needed = window_elements(self.split, text, dim)
        if self.window is not None and len(self.window.own) < needed:
            raise ValueError(f"The window has {len(self.window.own)} elements; the forward needs {needed}.")
        start = number * rows * max(self.split.heads) * dim
        return self._memory(x, start, rows * heads * dim).view(rows, heads, dim)

    def own_rows(self, number: int) -> slice:
        """Return the rows of this rank's tokens in an input of attention of ranks that gather keys and values."""
        return slice(0, self.split.tokens[self._index]) if number == QUERIES else self.tokens

    def gather_rows(self, x: Tensor) -> Wait:
        """Send the rows of this rank's tokens of x, keys or values of all tokens, and receive those of the other rank.

        x: an `input`, [all tokens + text, heads, dim].
        """
        if self.group is None:
            return _nothing
        other = 1 - self._index
        own, others = x[self.tokens].view(-1), x[_slice(self.split.token_range(other))].view(-1)
        if self.window is not None:
            start = own.storage_offset() - self.window.own.storage_offset()
            self.window.send(own, [(other, start, own)])
            return self.window.complete
        receive, send = ([size if rank == other else 0 for rank in range(2)] for size in (len(others), len(own)))
        return dist.all_to_all_single(others, own, receive, send, group=self.group, async_op=True).wait

    def release_inputs(self) -> None:
        """Let the inputs of attention be overwritten when the work that was launched so far is done."""
        if self.split.gathers and self.window is not None:
            self.window.release()

    def scatter_heads(self, x: Tensor, out: Tensor) -> Wait:
        """Send this rank's tokens, in the order of `fused.place_heads`, and receive all tokens of its heads in `out`.

        out: [all tokens, own heads, dim], the start of an `input`.
        """
        return self._exchange(x.view(-1), out.view(-1), _exchanges(self.split, out.shape[-1]))

    def gather_heads(self, x: Tensor) -> Callable[[], Tensor]:
        """Send the results of own heads, [all tokens, own heads, dim], and receive all heads of this rank's tokens.

        Returns a function that waits for them and returns them, [own tokens, heads * dim]. Ranks that gather keys and
        values have them already.
        """
        if self.split.gathers:
            return lambda: x.flatten(1)
        exchanges = [exchange.reverse for exchange in _exchanges(self.split, x.shape[-1])]
        own, most = self.split.tokens[self._index], max(self.split.tokens)
        return self._gather(x.reshape(-1), exchanges, own, x.shape[-1], most)

    def gather_text(self, x: Tensor) -> Callable[[], Tensor]:
        """Gather all heads of the text, x [tokens, own heads, dim], as `gather_heads` does: [tokens, heads * dim]."""
        if self.split.gathers:
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


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


def _nothing() -> None:
    """A `Wait` that returns at once."""
