"""The process of one rank: connect, start, run jobs, report. It runs any kind of job through its `Task`.

The main thread runs tasks. A second thread receives the controller's messages, so that a job can be cancelled while it
runs. A third thread sends a heartbeat twice a second, by which the controller detects a job that makes no progress. If
the controller ends for any reason, the process exits at once.
"""

import contextlib
import logging
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import Cancelled, GroupError, NoRoom, NotLoaded, OutOfMemory
from . import devices
from .buffers import open_tensor
from .collective import agree, all_or_none
from .environment import RankEnvironment
from .listener import connect
from .output_file import OutputFile
from .peers import connect_world
from .protocol import (
    BROKEN,
    MESSAGE_LENGTH,
    Beat,
    Cancel,
    Channel,
    Done,
    Failed,
    Hello,
    Load,
    Message,
    Ready,
    Release,
    Released,
    Run,
    Stop,
)
from .task import JobWatch, Task

log = logging.getLogger("hv15")
BEAT_SECONDS = 0.5
COMPUTES = 1 / 20
"""Fraction of a CPU above which a rank on the CPU is considered computing. A waiting rank uses a tenth of it; a
computing rank may get little more than this fraction on a busy machine."""
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


class Rank:
    """The state and main loop of this process. tasks: for each kind, a function that creates the task for a device."""

    def __init__(
        self,
        channel: Channel,
        started: RankEnvironment,
        tasks: Mapping[str, Callable[[torch.device], Task]],
        output: OutputFile,
    ) -> None:
        self.channel, self.started, self.output = channel, started, output
        self.makers, self.tasks = tasks, dict[str, Task]()
        self.world_size = len(started.devices)
        self.device: torch.device | None = None
        """Set when the device is activated."""
        self.watch = JobWatch()
        self.todo: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.peers_waiting = False
        """Whether the other ranks would wait for this one if it failed now."""

    def run(self) -> None:
        """Start, then process messages until `Stop`."""
        self.channel.send(Hello(self.started.rank, os.getpid(), self.started.device))
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        self.device = devices.activate(self.started.device, self.world_size)
        self._join()
        self.channel.send(Ready())
        while True:
            match self.todo.get():
                case Load() as message:
                    self._answer(message, self._load)
                case Run() as message:
                    self._answer(message, self._run)
                case Release():
                    self._release()
                    self.channel.send(Released())
                case Stop():
                    break
        self._release()

    def _join(self) -> None:
        """Connect to the other ranks."""
        device = devices.Device(self.device)
        if self.world_size == 1:
            return
        connect_world(self.started, device)
        dist.all_reduce(torch.zeros(1))
        if not device.is_host:
            dist.all_reduce(torch.zeros(1, device=self.device))

    def _answer(self, message: Load | Run, act: Callable[[Load | Run], None]) -> None:
        self.watch.begin(message.id)
        self.peers_waiting = False
        try:
            act(message)
            id, done, total = self.watch.state
            if done != total:
                raise RuntimeError(f"The task ended after {done} of {total} steps.")
        except Cancelled:
            self.peers_waiting = False  # all ranks raise it together
            self._fail(message, "cancelled")
        except OutOfMemory as error:
            self.peers_waiting &= not error.on_all_ranks
            numbers = {"needed": error.needed, "free": error.free, "smallest_plan": error.smallest_plan}
            self._fail(message, "memory", str(error), **numbers)
        except NotLoaded as error:
            self._fail(message, "not loaded", str(error))
        except NoRoom:
            self._fail(message, "no room")
        except GroupError:
            raise  # ends this process, by which the controller detects that the group is broken
        except Exception as error:
            log.error("The job failed:\n%s", traceback.format_exc())
            self._fail(message, "error", f"{type(error).__name__}: {error}")
        else:
            self.channel.send(Done(id, done, total))
        finally:
            self.watch.moved += 1

    def _fail(self, message: Load | Run, reason: str, text: str = "", **numbers: int) -> None:
        self.channel.send(Failed(message.id, reason, text[:MESSAGE_LENGTH], self.peers_waiting, **numbers))

    def _load(self, message: Load) -> None:
        self._prepare(message, message.inputs)

    def _run(self, message: Run) -> None:
        task, tensors = self._prepare(message, {**message.inputs, **message.outputs})
        self.peers_waiting = self.world_size > 1
        task.run(message.fields, tensors, self.watch)

    def _prepare(self, message: Load | Run, shared: Mapping) -> tuple[Task, dict[str, Tensor]]:
        """Open the tensors and load the task. Raises on all ranks if it fails on any rank."""
        if message.kind not in self.makers:
            raise ValueError(f"There is no task of the kind {message.kind!r}.")
        if message.kind not in self.tasks:
            self.tasks[message.kind] = self.makers[message.kind](self.device)
        task = self.tasks[message.kind]
        self._make_room(task, message)

        def load() -> dict[str, Tensor]:
            tensors = {name: open_tensor(place) for name, place in shared.items()}
            task.load(message.fields, tensors, self.watch)
            return tensors

        return task, all_or_none(load)

    def _make_room(self, task: Task, message: Load | Run) -> None:
        """Release the idle tasks if this task could not run at full speed beside them.

        Raises NoRoom instead, on all ranks, if the message allows it.
        """
        idle = [other for other in self.tasks.values() if other is not task]
        may_decline = isinstance(message, Run) and message.may_decline
        if not (idle or may_decline):
            return
        free = devices.Device(self.device).free_bytes(self.world_size)
        if agree(not all_or_none(lambda: task.fits(message.fields, free))):
            if may_decline:
                raise NoRoom
            for other in idle:
                other.release()

    def _release(self) -> None:
        for task in self.tasks.values():
            task.release()

    def _listen(self) -> None:
        try:
            while True:
                message = self.channel.receive()
                if isinstance(message, Cancel):
                    self.watch.cancel(message.id)
                else:
                    self.todo.put(message)
                if isinstance(message, Stop):
                    return
        except BROKEN as error:
            # The controller has ended, or has closed this rank's connection. No process needs the current job.
            exit_orphaned(error)

    def _beat(self) -> None:
        try:
            controller = psutil.Process(self.started.controller)
        except psutil.NoSuchProcess as error:
            exit_orphaned(error)
        own, computed = psutil.Process(), 0.0
        while True:
            if not controller.is_running():  # a forked child of the controller may hold the connection open
                exit_orphaned(ProcessLookupError("the controller has ended"))
            before, computed = computed, own.cpu_times().user
            on_host = self.device is not None and devices.Device(self.device).is_host
            if on_host and computed - before > BEAT_SECONDS * COMPUTES:
                # One convolution on the CPU may take minutes. (A thread that waits for a GPU uses the CPU, too.)
                self.watch.moved += 1
            try:
                self.channel.send(Beat(*self.watch.state, self.watch.moved))
            except BROKEN:
                return  # `_listen` ends the process
            self.output.rotate()
            time.sleep(BEAT_SECONDS)


def exit_orphaned(error: Exception) -> NoReturn:
    """End this process and its launcher, and delete the group's folder, because the controller has ended."""
    log.error("The rank exits: its connection to the controller was lost (%s: %s).", type(error).__name__, error)
    started = RankEnvironment.from_env()
    shutil.rmtree(started.folder, ignore_errors=True)
    if os.getppid() == started.launcher:  # a launcher that is suspended would never exit by itself
        with contextlib.suppress(OSError):
            os.kill(started.launcher, KILL)
    os._exit(1)


def main(tasks: Mapping[str, Callable[[torch.device], Task]]) -> NoReturn:
    """Run this process as a rank with these kinds of tasks."""
    started = RankEnvironment.from_env()
    output = OutputFile(started.logs / f"rank-{started.rank}.log")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        channel = connect(started.control, (started.folder / "key").read_bytes())
    except BROKEN as error:
        exit_orphaned(error)
    try:
        Rank(channel, started, tasks, output).run()
    except BaseException:
        log.critical("The rank exits because of an error:\n%s", traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)
    # Exit without destroying the process groups, which could wait for ranks that have already exited.
    os._exit(0)
