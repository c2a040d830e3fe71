"""Denoising steps of a rank's task within memory limits: what `python -m benchmarks.denoise --memory-gib` measures.

Unlike the other variants, a task maps its weights from a checkpoint in shared memory, as a rank does, and loads as many
of them as the limit allows. A row has the time of the first load, of a step, of a step whose timestep is new, and of
the return of the weights after a release.
"""

import gc
import time
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.decode import synchronize
from benchmarks.random_weights import random_tensor
from distributed.denoise.handover import SharedTransformer, share_transformer
from distributed.denoise.job import Conditions, DenoiseJob
from distributed.denoise.layout import Architecture
from distributed.denoise.task import DenoiseTask
from distributed.denoise.weights import core_shapes
from distributed.ranks.task import JobWatch
from distributed.shared_weights import LazyTensor

TIMESTEP, NEXT = 731.0, 702.0
SMALL = Architecture(heads=2, layers=6)
"""For the CPU."""


def random_transformer(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> SharedTransformer:
    """Share a transformer with seeded random weights that preserve the variance of activations.

    device: where the weights are drawn, one by one.
    """
    generator = torch.Generator(device).manual_seed(0)
    tensors = {
        key: LazyTensor(shape, dtype, partial(random_tensor, key, shape, generator, dtype))
        for key, shape in core_shapes(architecture).items()
    }
    return share_transformer(tensors, "random")


class TaskSteps:
    """Steps of one size within one limit, in bytes or None, on all ranks. Its methods are collectives.

    transformer: on rank 0; None on the others. text: the number of valid text tokens.
    """

    def __init__(
        self,
        transformer: SharedTransformer | None,
        size: tuple[int, int, int],
        text: int,
        memory: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.device, self.task, self.watch = device, DenoiseTask(device), JobWatch()
        shared: list = [None]
        if transformer is not None:
            shared = [_describe(transformer, size, text, memory, str(dtype).removeprefix("torch."))]
        if dist.is_initialized():
            dist.broadcast_object_list(shared)
        loads, self.fields, self.tensors = shared[0]
        for fields, tensors in loads:
            self.task.load(fields, tensors, self.watch)

    def load(self) -> float:
        """Load the weights and return the seconds."""
        synchronize(self.device)
        start = time.perf_counter()
        self.task.load(self.fields, self.tensors, self.watch)
        synchronize(self.device)
        return round(time.perf_counter() - start, 3)

    def step(self, timestep: float = TIMESTEP) -> Tensor:
        """Compute a step, with the modulation if the timestep is new, and return the rows of this rank."""
        fields = self.fields | {"request": self.fields["request"] | {"timesteps": [timestep]}}
        tensors = self.tensors | {"rows": torch.full(self.tensors["rows"].shape, torch.nan)}
        self.task.load(fields, tensors, self.watch)
        self.task.run(fields, tensors, self.watch)
        rows = tensors["rows"][0, 0]
        return rows[~rows[:, 0].isnan()]  # the others are those of other ranks

    def new_timestep(self) -> float:
        """Return the seconds of a step with a timestep that had no step before."""
        synchronize(self.device)
        start = time.perf_counter()
        self.step(NEXT)
        synchronize(self.device)
        return round(time.perf_counter() - start, 3)

    def back(self) -> float:
        """Release the device memory, and return the seconds in which the weights return to the device."""
        self.task.release()
        gc.collect()
        return self.load()

    @property
    def resident(self) -> str:
        """Which weights stay on the device."""
        modulated, resident, blocks = self.task.placement
        return f"{resident} of {blocks} blocks{' and the modulation' if modulated else ''}"


def _describe(
    transformer: SharedTransformer, size: tuple[int, int, int], text: int, memory: int | None, dtype: str
) -> tuple:
    """Return the loads of a step, its fields, and its tensors."""
    generator = torch.Generator().manual_seed(1)
    architecture = transformer.checkpoint.architecture
    latents = torch.randn(1, architecture.in_channels, *size, generator=generator)
    prompt = torch.randn(1, text, architecture.text_width, generator=generator)
    conditions = Conditions.make(transformer.checkpoint, prompt)
    job = DenoiseJob.make(transformer.checkpoint, latents, TIMESTEP, [conditions], memory=memory)
    loads = [(load.fields | {"dtype": dtype}, dict(load.inputs)) for load in job.loads]
    outputs = {name: torch.zeros(spec.shape) for name, spec in job.outputs.items()}
    return loads, job.fields | {"dtype": dtype}, {**job.inputs, **outputs}
