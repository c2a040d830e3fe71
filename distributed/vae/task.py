"""The rank's side of a decode."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..ranks.collective import Watch
from ..ranks.shared_memory import local_path
from .checkpoint import Checkpoint, decoder_tensors, open_checkpoint
from .engine import Engine
from .hunyuanvideo15.warm_up import warm_up
from .hunyuanvideo15.weights import Weights
from .job import DecodeRequest
from .plan import USABLE, choose_plan
from .regions import divide

READ_BYTES = 2**24
UNLIMITED = 2**62


class DecodeTask:
    """The decoder of one checkpoint on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.engine: Engine | None = None
        self.loaded: tuple[str, str] | None = None
        """Identity of the checkpoint in the engine, and its dtype."""
        self.read: tuple[str, str] | None = None
        """Identity and dtype of the checkpoint that was last read into host memory."""

    def load(self, fields: Mapping, tensors: Mapping[str, Tensor], watch: Watch) -> None:
        """Load the checkpoint, or only read it on the devices in `host_only`, and compile the decoder's kernels."""
        checkpoint = open_checkpoint(local_path(fields["checkpoint"]))
        wanted = checkpoint.identity, fields["dtype"]
        if self.loaded == wanted:
            return
        if "host_only" not in fields:  # called by a run, which loads on every device
            self._load(checkpoint, wanted, watch)
            return
        if str(self.device) not in fields["host_only"]:
            self._load(checkpoint, wanted, watch)
        elif self.read != wanted:
            _read(checkpoint, watch)
            self.read = wanted
        warm_up(checkpoint.architecture, self.device, getattr(torch, fields["dtype"]))

    def run(self, fields: Mapping, tensors: Mapping[str, Tensor], watch: Watch) -> None:
        """Decode this rank's share of the tensor "latent" into "frames"."""
        request = DecodeRequest.from_json(fields["request"])
        self.engine.decode(request, tensors["latent"], tensors["frames"], watch)

    def fits(self, fields: Mapping, free: int) -> bool:
        """Return whether a decode without blocks, or a load, fits in `free` bytes."""
        if str(self.device) in fields.get("host_only", ()):
            return True
        checkpoint = open_checkpoint(local_path(fields["checkpoint"]))
        if self.loaded == (checkpoint.identity, fields["dtype"]):
            weights = self.engine.weights
        else:
            dtype = getattr(torch, fields["dtype"])
            weights = Weights.without_memory(decoder_tensors(checkpoint), self.device, dtype)
        available = free + (self.engine.weights.nbytes if self.engine else 0)
        if "request" not in fields:
            return weights.nbytes <= available
        request = DecodeRequest.from_json(fields["request"])
        _, _, time, *picture = request.latent_shape
        division = divide(*picture, dist.get_world_size() if dist.is_initialized() else 1)
        region = division.largest.height, division.largest.width
        shared = division.size > 1
        _, needed = choose_plan(weights, region, tuple(picture), time, shared, UNLIMITED, allow_blocks=False)
        return min(needed / USABLE, request.memory or math.inf) <= available

    def release(self) -> None:
        """Free the device memory. The next job loads the checkpoint again."""
        if self.engine:
            self.engine.release()
        self.engine = self.loaded = self.read = None

    def _load(self, checkpoint: Checkpoint, wanted: tuple[str, str], watch: Watch) -> None:
        self.release()
        self.engine = Engine(decoder_tensors(checkpoint), self.device, getattr(torch, wanted[1]))
        self.loaded = wanted
        watch.progress(0, 0)


def _read(checkpoint: Checkpoint, watch: Watch) -> None:
    """Read the files once, so that they are in the page cache when they are loaded."""
    for file in checkpoint.files:
        with open(file, "rb") as content:
            while content.read(READ_BYTES):
                watch.progress(0, 0)
