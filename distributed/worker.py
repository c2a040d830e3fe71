"""One rank's process: connect, come up, run jobs, report. Started by torchrun as `python -m distributed.worker`.

The main thread decodes. A second one listens to the controller and a third sends a sign of life twice a second, so a
cancel is heard in the middle of a decode and a decode that stands still is noticed. When the controller goes away, by
whatever end, the process leaves at once.
"""

import datetime
import logging
import os
import queue
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from . import devices
from .engine import Cancelled, Engine, OutOfMemory
from .frames import open_frames
from .plan import Job
from .protocol import BROKEN, Channel, connect
from .weights import Checkpoint, decoder_tensors, open_checkpoint

log = logging.getLogger("hv15")
BEAT_SECONDS = 0.5


class JobWatch:
    """What is known of the job in hand; told by the engine, read by the beat."""

    def __init__(self) -> None:
        self.id = 0
        self.done = self.total = 0
        self.moved = 0
        """Grows with every sign of progress; a controller that sees it stand still knows that the rank hangs."""
        self._cancelled: set[int] = set()

    def begin(self, id: int) -> None:
        self.id, self.done, self.total = id, 0, 0
        self.moved += 1

    def progress(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self.moved += 1

    def cancel(self, id: int) -> None:
        self._cancelled.add(id)

    def cancelled(self) -> bool:
        return self.id in self._cancelled


class Rank:
    """This process, seen from the inside."""

    def __init__(self, channel: Channel, device_name: str) -> None:
        self.channel = channel
        self.device_name = device_name
        self.watch = JobWatch()
        self.todo: queue.SimpleQueue = queue.SimpleQueue()
        self.engine: Engine | None = None
        self.loaded: tuple[str, str] | None = None

    def run(self) -> None:
        """Come up, then do what is asked until told to stop."""
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.channel.send("hello", rank=rank, pid=os.getpid(), device=self.device_name)
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        kind = self.device_name.split(":")[0]
        self.device = devices.activate(self.device_name)
        if world_size > 1:
            dist.init_process_group(
                devices.collective_backend(kind, os.environ["HV15_BACKEND"]),
                device_id=None if kind == "cpu" else self.device,
                timeout=datetime.timedelta(days=1),  # hangs are noticed by their lack of progress, not by a fixed time
            )
            dist.all_reduce(torch.zeros(1))
            if kind != "cpu":
                dist.all_reduce(torch.zeros(1, device=self.device))
        self.channel.send("ready")
        while (message := self.todo.get())["type"] != "stop":
            if message["type"] == "release":
                self._release()
                self.channel.send("released")
            else:
                self._do(message)
        self._release()

    def _do(self, message: dict) -> None:
        self.watch.begin(message["id"])
        try:
            job = Job(**{**message["job"], "latent_shape": tuple(message["job"]["latent_shape"])})
            latent = torch.frombuffer(bytearray(message["raw"]), dtype=torch.float32).view(job.latent_shape)
            engine = self._engine(open_checkpoint(message["checkpoint"]), job.dtype)
            engine.decode(job, latent, open_frames(message["frames"], job.frames_shape), self.watch)
        except Cancelled:
            self._failed(message, "cancelled", "")
        except OutOfMemory as error:
            self._failed(message, "memory", str(error), needed=error.needed, free=error.free)
        except torch.OutOfMemoryError as error:
            self._failed(message, "memory", str(error).split(". ")[0], needed=0, free=0)
        except Exception as error:
            log.error("The job failed:\n%s", traceback.format_exc())
            self._failed(message, "error", f"{type(error).__name__}: {error}")
        else:
            self._say_beat()
            self.channel.send("done", id=message["id"])
        finally:
            self.watch.moved += 1

    def _failed(self, message: dict, kind: str, text: str, **numbers: int) -> None:
        self.channel.send("failed", id=message["id"], kind=kind, message=text[:4000], **numbers)

    def _engine(self, checkpoint: Checkpoint, dtype: str) -> Engine:
        wanted = (checkpoint.identity, dtype)
        if self.loaded != wanted:
            self._release()
            self.engine = Engine(decoder_tensors(checkpoint), self.device, getattr(torch, dtype))
            self.loaded = wanted
            self.watch.moved += 1
        return self.engine

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
        except BROKEN:
            # The controller is gone. Whatever the main thread is in the middle of, nobody waits for it.
            shutil.rmtree(os.environ["HV15_FOLDER"], ignore_errors=True)
            os._exit(1)

    def _beat(self) -> None:
        while True:
            try:
                self._say_beat()
            except BROKEN:
                return  # `_listen` sees to it
            time.sleep(BEAT_SECONDS)

    def _say_beat(self) -> None:
        watch = self.watch
        self.channel.send("beat", id=watch.id, done=watch.done, total=watch.total, moved=watch.moved)


def main() -> None:
    """The process's life."""
    folder, local_rank = Path(os.environ["HV15_FOLDER"]), int(os.environ["LOCAL_RANK"])
    output = os.open(folder / f"rank-{os.environ['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    host, port = os.environ["HV15_CONTROL"].split(":")
    channel = connect((host, int(port)), (folder / "key").read_bytes())
    rank = Rank(channel, os.environ["HV15_DEVICES"].split(",")[local_rank])
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
