"""An echo task for tests of supervision, which needs no VAE, and ranks that cause faults on request.

`Echo` is the job: it computes y = x + 1, divided between the ranks, in `steps` steps of `seconds` each. One rank causes
the `fault` in the first step:

raise       raises an exception that the other ranks do not raise
hang        never reaches the next collective, but keeps sending heartbeats
exit        exits with code 7
chatter     writes two megabytes to its standard output
short       returns before its work is complete
send        sends the given frame to the controller
long        sends the length of a message of four gigabytes
refuse      raises an exception while it loads, before the job
If `once`, a path, is given, the fault is caused only if the file exists, and the file is deleted.

Decodes read their fault from the file that HV15_TEST_FAULT names, "FAULT RANK" or "FAULT RANK once". `memory`: the rank
runs out of memory during a decode. `load`: it runs out of memory while it loads weights. `late`: it never connects.
"""

import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.errors import Cancelled, NotLoaded, OutOfMemory
from distributed.jobs import Load, TensorSpec
from distributed.ranks import rank as rank_module
from distributed.ranks.collective import agree

GIB = 2**30
CHANNELS = []
"""This rank's channel."""


@dataclass(frozen=True, eq=False)
class Echo:
    """The job in the controller. needs: name of a number that ranks must have loaded, which is added to y.

    fits_in: size in bytes; without a memory limit, or with a higher one, ranks run out of memory. wants: free device
    memory in bytes that full speed requires.
    """

    x: Tensor
    steps: int = 1
    seconds: float = 0
    fault: str | None = None
    rank: int = 1
    once: Path | None = None
    frame: str = ""
    needs: str | None = None
    loads: tuple[Load, ...] = ()
    fits_in: int | None = None
    smallest_plan: bool = False
    wants: int = 0
    memory: int | None = None
    kind: str = "echo"
    noun: str = "echo"
    last: bool = True
    extra: dict = field(default_factory=dict)

    @property
    def fields(self) -> dict:
        names = ("steps", "seconds", "fault", "rank", "frame", "needs", "fits_in", "smallest_plan", "wants", "memory")
        return {name: getattr(self, name) for name in names} | {"once": self.once and str(self.once)} | self.extra

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"x": self.x}

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        return {"y": TensorSpec(tuple(self.x.shape), self.x.dtype)}

    def limited(self, memory: int) -> "Echo":
        return replace(self, memory=memory)


def keep(name: str, value: float) -> Load:
    """Return a load that stores a number on the ranks under a name."""
    return Load("echo", {"keep": name}, {"value": torch.tensor([value])})


class EchoTask:
    """The task on a rank."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.kept: dict[str, float] = {}
        self.released = 0

    def load(self, fields: Mapping, tensors: Mapping[str, Tensor], watch: object) -> None:
        if "keep" in fields:
            self.kept[fields["keep"]] = float(tensors["value"])
            return
        if self._due(fields, "refuse"):
            raise ValueError("a job that is not to be run")
        if fields["needs"] and fields["needs"] not in self.kept:
            raise NotLoaded(f"{fields['needs']} was not loaded")

    def run(self, fields: Mapping, tensors: Mapping[str, Tensor], watch: object) -> None:
        x, y = (tensors[name][self.rank :: self.world_size] for name in ("x", "y"))
        for step in range(fields["steps"]):
            if agree(watch.cancelled()):
                raise Cancelled
            time.sleep(fields["seconds"])
            if step == 0:
                self._check_memory(fields)
                if self._misbehave(fields, watch):
                    return
            rows = slice(step * len(x) // fields["steps"], (step + 1) * len(x) // fields["steps"])
            y[rows] = x[rows] + 1 + self.kept.get(fields["needs"], 0)
            watch.progress(step + 1, fields["steps"])
        if "released" in fields:
            y[:] = self.released

    def fits(self, fields: Mapping, free: int) -> bool:
        return fields.get("wants", 0) <= free

    def release(self) -> None:
        self.kept.clear()
        self.released += 1

    def _check_memory(self, fields: Mapping) -> None:
        limit, fits_in = fields["memory"], fields["fits_in"]
        if fits_in is not None and (limit is None or limit > fits_in):
            raise OutOfMemory(
                limit or 8 * GIB,
                4 * GIB,
                self.device,
                noun="echo",
                smallest_plan=fields["smallest_plan"],
                on_all_ranks=True,
            )

    def _due(self, fields: Mapping, *faults: str) -> bool:
        if fields["fault"] not in faults or fields["rank"] != self.rank:
            return False
        if fields["once"] is None:
            return True
        there = os.path.exists(fields["once"])
        if there:
            os.unlink(fields["once"])
        return there

    def _misbehave(self, fields: Mapping, watch: object) -> bool:
        """Cause the requested fault, if any. Return whether the task must return at once."""
        if not self._due(fields, "raise", "hang", "exit", "chatter", "short", "send", "long"):
            return False
        match fields["fault"]:
            case "raise":
                raise RuntimeError(f"a fault of rank {self.rank}")
            case "hang":
                time.sleep(1000)
            case "exit":
                print("last words of a rank", flush=True)
                os._exit(7)
            case "chatter":
                print("chatter\n" * 2**18, flush=True)
            case "short":
                watch.progress(1, 2)
                return True
            case "send":
                frame = fields["frame"].replace("ID", str(watch.state[0])).encode()
                CHANNELS[0].send_frame(frame)
                time.sleep(1000)
            case "long":
                CHANNELS[0]._connection.sendall(struct.pack("!I", 2**32 - 1))
                time.sleep(1000)
        return False


def decode_fault(*faults: str) -> bool:
    """Return whether one of these faults of a decode is requested from this rank."""
    file = Path(os.environ["HV15_TEST_FAULT"])
    try:
        fault, rank, *once = file.read_text().split()
    except OSError:
        return False
    due = fault in faults and rank == os.environ["RANK"]
    if due and once:
        file.unlink()
    return due


def main() -> None:
    """Run this process as a rank that causes faults on request."""
    from distributed.vae.engine import Engine
    from distributed.vae.hunyuanvideo15.weights import Weights
    from distributed.vae.task import DecodeTask

    connect, write, load = rank_module.connect, Engine._write, Weights.__init__

    def connect_and_keep(*args: object) -> object:
        CHANNELS.append(connect(*args))
        return CHANNELS[0]

    def write_or_fail(self: Engine, *args: object) -> None:
        if decode_fault("memory"):
            raise torch.OutOfMemoryError("a fault")
        write(self, *args)

    def load_or_fail(self: Weights, tensors: dict, device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "meta" and decode_fault("load"):
            raise torch.OutOfMemoryError("a fault")
        load(self, tensors, device, dtype)

    rank_module.connect = connect_and_keep
    if "HV15_TEST_FAULT" in os.environ:
        Engine._write, Weights.__init__ = write_or_fail, load_or_fail
        if decode_fault("late"):
            time.sleep(1000)
    rank_module.main({"echo": EchoTask, "other": EchoTask, "decode": DecodeTask})


if __name__ == "__main__":
    main()
