"""What a controller can ask of its ranks, whatever the kind of work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class TensorSpec(NamedTuple):
    """A tensor to be filled by the ranks."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class Load:
    """Something that ranks load for later jobs of this kind, such as weights or conditions.

    `fields` are JSON, `inputs` tensors on the CPU; the kind's task gets both. The group adds its `dtype` to the fields.
    """

    kind: str
    fields: Mapping[str, object]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


class Job(Protocol):
    """One job: inputs in, outputs filled. `RankGroup.run` sends it, watches it and retries it."""

    @property
    def kind(self) -> str:
        """The key of the task in `worker.TASKS`, which the group's status shows."""

    @property
    def noun(self) -> str:
        """What messages call this work, after "the"."""

    @property
    def fields(self) -> Mapping[str, object]:
        """What the task is told, JSON alone. The group adds its `dtype`."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """Tensors on the CPU by their name. They are copied to shared memory."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Tensors to fill, by their name."""

    @property
    def loads(self) -> Sequence[Load]:
        """What to load when ranks answer that they lack it (`NotLoaded`); the job is then sent again."""

    @property
    def memory(self) -> int | None:
        """Bytes that each rank may use; None: all that is free."""

    @property
    def last(self) -> bool:
        """Whether the group's `keep_loaded` applies after this job. Not so within a series of jobs."""

    def limited(self, memory: int) -> "Job":
        """Return the same job with another memory limit, for a retry after ranks ran out of memory."""
