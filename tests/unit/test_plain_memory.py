"""Peak memory of a decode without Triton, counted on full-size meta tensors."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distributed.ops import kernels, winograd
from distributed.vae.hunyuanvideo15.decoder import Tail, Trunk, split
from distributed.vae.plan import choose_plan
from distributed.vae.regions import whole


class Live(TorchDispatchMode):
    """Counts the bytes of all live meta tensors that operations have created."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta":
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference not in self.storages:
                    self.storages[reference] = storage.nbytes()
                    self.now += storage.nbytes()
        if self.now > self.peak:
            for reference in [each for each in self.storages if each.expired()]:
                self.now -= self.storages.pop(reference)
            self.peak = max(self.peak, self.now)
        return result


def convolve(frames: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Return a channels-last result, as real devices do for channels-last frames; meta tensors may differ."""
    n, _, height, width = frames.shape
    return frames.new_empty(n, height - 2, width - 2, len(taps)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("shape", [(5, 30, 53), (1, 68, 120)], ids=str)
def test_the_peak_memory_without_triton_does_not_exceed_the_plan(full_size, shape, monkeypatch):
    monkeypatch.setattr(winograd, "conv2d", convolve)
    monkeypatch.setattr(kernels, "STRIP", 4 * kernels.STRIP)  # larger strips use more memory and fewer operations
    time, size = shape[0], shape[1:]
    with Live() as live, torch.no_grad():
        weights = full_size()
        live.peak = 0
        plan, needed = choose_plan(weights, size, size, time, False, 2**60)
        video = torch.empty(*shape, weights.latent_channels, dtype=weights.dtype, device=weights.device)
        chunks = Trunk(weights, *size, time).run(split(video, plan.steps.trunk))
        frames = sum(len(piece) for piece in Tail(weights, whole(*size, weights.convs), plan.steps).run(chunks))
    assert frames == 4 * (time - 1) + 1
    assert live.peak <= needed
