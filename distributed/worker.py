"""One rank's process: connect, come up, run jobs, report. Started by torchrun as `python -m distributed.worker`.

The main thread decodes. A second one listens to the controller and a third sends a sign of life twice a second, so a
cancel is heard in the middle of a decode and a decode that stands still is noticed. When the controller goes away, by
whatever end, the process leaves at once.
"""

import contextlib
import datetime
import logging
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from .errors import Cancelled, OutOfMemory
from .ops import kernels
from .ranks import devices
from .ranks.buffers import local_path, open_frames
from .ranks.collective import all_or_none
from .ranks.environment import RankEnvironment
from .ranks.protocol import BROKEN, Channel, connect
from .vae.checkpoint import Checkpoint, decoder_tensors, open_checkpoint
from .vae.engine import Engine
from .vae.job import DecodeRequest

log = logging.getLogger("hv15")
BEAT_SECONDS = 0.5
LOG_BYTES = 2**20
READ_BYTES = 2**24
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


class JobWatch:
    """What is known of the job in hand; told by the engine, read by the beat."""

    def __init__(self) -> None:
        self.id = 0
        self.done = self.total = 0
        self.moved = 0
        """Grows with every sign of progress; a controller that sees it stand still knows that the rank hangs."""
        self._cancelled: set[int] = set()

    def begin(self, id: int) -> None:
        self.done = self.total = 0  # before the id, lest a beat pair the new one with the progress of the old
        self.id = id
        self.moved += 1

    def progress(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self.moved += 1

    def cancel(self, id: int) -> None:
        self._cancelled.add(id)

    def cancelled(self) -> bool:
        self.moved += 1  # the engine asks between chunks, long before the first pixel where it decodes in blocks
        return self.id in self._cancelled


class Rank:
    """This process, seen from the inside."""

    def __init__(self, channel: Channel, started: RankEnvironment, output: "OutputFile") -> None:
        self.channel, self.output, self.started = channel, output, started
        self.device_name = started.device
        self.world_size = len(started.devices)
        self.watch = JobWatch()
        self.todo: queue.SimpleQueue = queue.SimpleQueue()
        self.engine: Engine | None = None
        self.loaded: tuple[str, str] | None = None
        self.apart = False
        """Whether a failure now would leave the other ranks waiting for this one."""

    def run(self) -> None:
        """Come up, then do what is asked until told to stop."""
        rank, world_size = self.started.rank, self.world_size
        self.channel.send("hello", rank=rank, pid=os.getpid(), device=self.device_name)
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        self.device = devices.activate(self.device_name)
        device = devices.Device(self.device)
        if world_size > 1:
            dist.init_process_group(
                device.collective_backend(self.started.backend),
                store=dist.FileStore(str(self.started.folder / "store"), world_size),
                rank=rank,
                world_size=world_size,
                device_id=device.process_group_device,
                timeout=datetime.timedelta(days=1),  # hangs are noticed by their lack of progress, not by a fixed time
            )
            dist.all_reduce(torch.zeros(1))
            if not device.is_host:
                dist.all_reduce(torch.zeros(1, device=self.device))
        self.channel.send("ready")
        while (message := self.todo.get())["type"] != "stop":
            match message["type"]:
                case "release":
                    self._release()
                    self.channel.send("released")
                case "load":
                    self._answer(message, self._preload)
                case "job":
                    self._answer(message, self._decode)
        self._release()

    def _answer(self, message: dict, act: Callable[[dict], None]) -> None:
        self.watch.begin(message["id"])
        self.apart = False
        try:
            act(message)
        except Cancelled:
            self.apart = False  # ranks agree on it
            self._failed(message, "cancelled")
        except OutOfMemory as error:
            self.apart &= not error.on_all_ranks
            self._failed(message, "memory", str(error), needed=error.needed, free=error.free, least=error.least)
        except Exception as error:
            log.error("The job failed:\n%s", traceback.format_exc())
            self._failed(message, "error", f"{type(error).__name__}: {error}")
        else:
            self._say_beat()
            self.channel.send("done", id=message["id"])
        finally:
            self.watch.moved += 1

    def _decode(self, message: dict) -> None:
        job = DecodeRequest(**{**message["job"], "latent_shape": tuple(message["job"]["latent_shape"])})

        def prepare() -> tuple[Tensor, Tensor]:
            self._load(open_checkpoint(local_path(message["checkpoint"])), job.dtype)
            latent = torch.frombuffer(bytearray(message["raw"]), dtype=torch.float32).view(job.latent_shape)
            return latent, open_frames(message["frames"], job.frames_shape)

        latent, frames = all_or_none(prepare)
        self.apart = self.world_size > 1
        self.engine.decode(job, latent, frames, self.watch)

    def _preload(self, message: dict) -> None:
        def prepare() -> None:
            checkpoint = open_checkpoint(local_path(message["checkpoint"]))
            if self.device_name in message["shared"]:
                for file in checkpoint.files:  # so that it is in the host's memory when it is wanted
                    with open(file, "rb") as content:
                        while content.read(READ_BYTES):
                            self.watch.moved += 1
            else:
                self._load(checkpoint, message["dtype"])
            widths = tuple(reversed(checkpoint.block_out_channels))
            kernels.warm_up(checkpoint.latent_channels, widths, self.device, getattr(torch, message["dtype"]))

        all_or_none(prepare)

    def _failed(self, message: dict, kind: str, text: str = "", **numbers: int) -> None:
        self.channel.send("failed", id=message["id"], kind=kind, message=text[:4000], apart=self.apart, **numbers)

    def _load(self, checkpoint: Checkpoint, dtype: str) -> None:
        wanted = (checkpoint.identity, dtype)
        if self.loaded != wanted:
            self._release()
            self.engine = Engine(decoder_tensors(checkpoint), self.device, getattr(torch, dtype))
            self.loaded = wanted
            self.watch.moved += 1

    def _release(self) -> None:
        if self.engine:
            self.engine.release()
        self.engine = self.loaded = None

    def _listen(self) -> None:
        try:
            while True:
                message, raw = self.channel.receive()
                if message["type"] == "cancel":
                    self.watch.cancel(message["id"])
                else:
                    self.todo.put({**message, "raw": raw})
                if message["type"] == "stop":
                    return
        except BROKEN as error:
            # The controller is gone, or has given this rank up. Whatever the main thread does, nobody waits for it.
            leave_orphaned(error)

    def _beat(self) -> None:
        try:
            controller = psutil.Process(self.started.controller)
        except psutil.NoSuchProcess as error:
            leave_orphaned(error)
        own, computed = psutil.Process(), 0.0
        while True:
            if not controller.is_running():  # a child that it forked may hold the connection open
                leave_orphaned(ProcessLookupError("the controller has ended"))
            before, computed = computed, own.cpu_times().user
            if self.device_name == "cpu" and computed - before > BEAT_SECONDS / 4:
                # A convolution may take minutes here. (A thread that waits for a GPU would look the same.)
                self.watch.moved += 1
            try:
                self._say_beat()
            except BROKEN:
                return  # `_listen` sees to it
            self.output.rotate()
            time.sleep(BEAT_SECONDS)

    def _say_beat(self) -> None:
        watch = self.watch
        self.channel.send("beat", id=watch.id, done=watch.done, total=watch.total, moved=watch.moved)


def leave_orphaned(error: Exception) -> NoReturn:
    """End this process when its controller has ended, and with it what the controller can no longer clean up."""
    log.error("The rank leaves: its connection ended (%s: %s).", type(error).__name__, error)
    started = RankEnvironment.from_env()
    shutil.rmtree(started.folder, ignore_errors=True)
    if os.getppid() == started.launcher:  # it may be stopped, and then would stay for ever
        with contextlib.suppress(OSError):
            os.kill(started.launcher, KILL)
    os._exit(1)


class OutputFile:
    """Takes what this process writes to its standard streams, native libraries included. Kept from growing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open()

    def open(self) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, sys.stdout.fileno())
        os.dup2(descriptor, sys.stderr.fileno())
        os.close(descriptor)

    def rotate(self) -> None:
        """Begin anew where the file is full, and keep the one before."""
        with contextlib.suppress(OSError):  # somebody else took it away
            if self.path.stat().st_size > LOG_BYTES:
                self.path.replace(self.path.with_suffix(".old.log"))
                self.open()


def main() -> None:
    """The process's life."""
    started = RankEnvironment.from_env()
    output = OutputFile(started.logs / f"rank-{started.rank}.log")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        channel = connect(started.control, (started.folder / "key").read_bytes())
    except BROKEN as error:
        leave_orphaned(error)
    rank = Rank(channel, started, output)
    try:
        rank.run()
    except BaseException:
        log.critical("The rank ends:\n%s", traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)
    # Destroying process groups can wait for peers that are gone already; there is nothing left to save.
    os._exit(0)


if __name__ == "__main__":
    main()
