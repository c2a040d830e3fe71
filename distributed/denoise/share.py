"""One rank's share of a branch: its tokens and heads, and their exchange with the other ranks.

Attention needs all tokens of a head. Before attention each rank sends the queries, keys and values of its tokens to the
ranks that compute their heads, and afterwards it receives the results (Ulysses). Values are sent first, while keys and
queries are computed. The received data is in token order, so it is received directly into the input of attention.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .parallel import Split

Wait = Callable[[], object]
"""Waits for a transfer: work launched after the call may use its result."""


class Share:
    """The share of the rank at `index` of a split. group: the process group of its ranks; None for a single rank."""

    def __init__(self, split: Split, index: int = 0, group: dist.ProcessGroup | None = None) -> None:
        if (group is None) != (len(split.ranks) == 1):
            raise ValueError(
                f"A split of {len(split.ranks)} ranks needs {'no group' if group else 'a group'}; group is {group}."
            )
        self.split, self.group = split, group
        self.ranks = len(split.ranks)
        tokens, heads = split.token_range(index), split.head_range(index)
        self.tokens, self.heads = slice(tokens.start, tokens.stop), slice(heads.start, heads.stop)
        self._index = index

    @property
    def total_tokens(self) -> int:
        """Number of video tokens of all ranks."""
        return sum(self.split.tokens)

    def scatter_heads(self, x: Tensor, out: Tensor) -> Wait:
        """Send this rank's tokens, in the order of `fused.place_heads`, and receive all tokens of its heads in `out`.

        out: [all tokens, own heads, dim].
        """
        exchange = self.split.exchange(self._index, out.shape[-1])
        return self._exchange(x.view(-1), out.view(-1), exchange.send, exchange.receive)

    def gather_heads(self, x: Tensor) -> Callable[[], Tensor]:
        """Send the results of own heads, [all tokens, own heads, dim], and receive all heads of this rank's tokens.

        Returns a function that waits for them and returns them, [own tokens, heads * dim].
        """
        if self.group is None:
            return lambda: x.flatten(1)
        dim, own = x.shape[-1], self.split.tokens[self._index]
        exchange = self.split.exchange(self._index, dim).reverse
        out = x.new_empty(sum(exchange.receive))
        wait = self._exchange(x.reshape(-1), out, exchange.send, exchange.receive)

        def result() -> Tensor:
            wait()
            of_ranks = zip(out.split(exchange.receive), self.split.heads, strict=True)
            return torch.cat([part.view(own, heads * dim) for part, heads in of_ranks], dim=1)

        return result

    def gather_text(self, x: Tensor) -> Callable[[], Tensor]:
        """Gather all heads of the text, x [tokens, own heads, dim], as `gather_heads` does: [tokens, heads * dim]."""
        if self.group is None:
            return lambda: x.flatten(1)
        tokens, _, dim = x.shape
        most = max(self.split.heads)
        own = x.new_zeros(tokens, most, dim)
        own[:, : x.shape[1]] = x
        every = x.new_empty(self.ranks * tokens, most, dim)
        work = dist.all_gather_into_tensor(every, own, group=self.group, async_op=True)

        def result() -> Tensor:
            work.wait()
            of_ranks = zip(every.split(tokens), self.split.heads, strict=True)
            return torch.cat([part[:, :heads] for part, heads in of_ranks], dim=1).flatten(1)

        return result

    def _exchange(self, x: Tensor, out: Tensor, send: tuple[int, ...], receive: tuple[int, ...]) -> Wait:
        return dist.all_to_all_single(out, x, list(receive), list(send), group=self.group, async_op=True).wait
