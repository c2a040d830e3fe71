"""The interface of a job: a request from the controller to its ranks, for any kind of work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that the ranks fill."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class Load:
    """Data that ranks load for later jobs of this kind, such as weights or conditions.

    fields: JSON values. inputs: tensors on the CPU. Both are passed to `Task.load`; the group adds its `dtype` to the
    fields.
    """

    kind: str
    fields: Mapping[str, object]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


class Job(Protocol):
    """One job, which reads inputs and fills outputs. `RankGroup.run` sends, monitors and retries it."""

    @property
    def kind(self) -> str:
        """Key of the task in `worker.TASKS`. The group's status shows it."""

    @property
    def noun(self) -> str:
        """Name of this work in messages, to follow "the": "decode"."""

    @property
    def fields(self) -> Mapping[str, object]:
        """Parameters of the task, as JSON values. The group adds its `dtype`."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """Input tensors on the CPU, by name. They are copied to shared memory."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Output tensors, by name."""

    @property
    def loads(self) -> Sequence[Load]:
        """Data to load if a rank reports that it is missing (`NotLoaded`). The job is then retried."""

    @property
    def memory(self) -> int | None:
        """Memory limit per rank in bytes. None: all free memory."""

    @property
    def last(self) -> bool:
        """Whether the group's `keep_loaded` applies after this job. False within a series of jobs."""

    def limited(self, memory: int) -> "Job":
        """Return the same job with another memory limit in bytes, for a retry after ranks ran out of memory."""
