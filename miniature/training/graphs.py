"""Training steps as CUDA graphs: one launch for all kernels of a step, instead of one for each."""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[..., dict[str, Tensor]]
WARM_STEPS = 3
"""Steps of each kind before it is captured: they create the optimizer's state and choose cuDNN's algorithms."""


def prepared(step: Step, device: torch.device, log: Callable[[str], None]) -> Step:
    """Return the step as CUDA graphs on a GPU, and the step itself on a CPU."""
    return Graphs(step, log, Capture()) if device.type == "cuda" else step


class Graphs:
    """Calls a function of tensors, and replays it as a CUDA graph from the fourth call with the same shapes on.

    The function returns detached tensors. It must not wait for the GPU, copy from the CPU, or draw random numbers:
    after a capture that failed, PyTorch's generator could not be used. The tensors that it changes must stay in place.
    Results are valid until the next call. If a capture fails, sizes without a graph are computed without one from then
    on.
    """

    def __init__(self, step: Step, log: Callable[[str], None], capture: "Capture") -> None:
        self.step, self.log = step, log
        self.capture: Capture | None = capture
        self.calls: dict[tuple, int] = {}
        self.replays: dict[tuple, Step] = {}

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        kind = tuple(one.shape for one in inputs)
        if kind in self.replays:
            return self.replays[kind](*inputs)
        if self.capture is None:
            return self.step(*inputs)
        calls = self.calls[kind] = self.calls.get(kind, 0) + 1
        if calls <= WARM_STEPS:
            return self.capture.warm_up(self.step, inputs)
        try:
            self.replays[kind] = self.capture(self.step, inputs)
        except RuntimeError as error:
            self.capture = None
            self.log(f"graphs: new sizes are computed without CUDA graphs, because a capture failed: {error}")
            return self.step(*inputs)
        return self.replays[kind](*inputs)


class Capture:
    """Makes CUDA graphs as https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture describes it.

    All graphs use one memory pool. That is safe in any order of replays, because no graph reads what another one left
    there: gradients are made anew in each step, and all that stays was made outside.
    """

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, step: Step, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Run a step on the stream on which the next one of this kind is captured."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = step(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def __call__(self, step: Step, inputs: tuple[Tensor, ...]) -> Step:
        """Capture a step, which does not run it, and return a function that replays it."""
        held = [one.clone() for one in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            results = step(*held)

        def replay(*inputs: Tensor) -> dict[str, Tensor]:
            for place, value in zip(held, inputs, strict=True):
                place.copy_(value)
            graph.replay()
            return results

        return replay
