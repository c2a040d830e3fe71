"""One set of running rank processes: started by torchrun (`launcher`), joined over the control connections, ended for
certain.

A `Ranks` lives from one start to one end and is never repaired: when anything about it is in doubt it is `broken`,
with the reason, and `RankGroup` replaces it. A thread of its own looks for signs of death and of standstill, whatever
else waits for what.
"""

import contextlib
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from . import devices as device_module
from .protocol import BROKEN, Channel, Door

log = logging.getLogger(__name__)

PACK = Path(__file__).resolve().parents[2]
WATCH_SECONDS = 0.5
BEATS_MISSED_SECONDS = 10
"""A rank that says nothing for this long is stopped or stuck beyond help (it speaks twice a second)."""
END_SECONDS = 1
"""How long the launcher may take to say how a rank ended."""
RUNS_KEPT = 16
"""Logs of this many starts are kept."""
LOG_LINES = 8


@dataclass
class RankRecord:
    """What the controller knows of one rank."""

    rank: int
    device: str
    pid: int | None = None
    state: str = "starting"
    done: int = 0
    total: int = 0
    moved: int = -1
    moved_at: float = field(default_factory=time.monotonic)
    heard_at: float = field(default_factory=time.monotonic)
    channel: Channel | None = None
    answer: dict | None = None
    """The rank's answer to the job in hand."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.device})"


class Ranks:
    """Rank processes for `devices`, one each. `changed` is notified, and `on_change` called, when a record changes.

    stall_seconds tells how long a rank may have a job and not move. Logs go to a new folder in `logs`.
    """

    def __init__(
        self,
        devices: Sequence[str],
        backend: str,
        worker: str,
        logs: Path,
        stall_seconds: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self.records = [RankRecord(rank, device) for rank, device in enumerate(devices)]
        self.changed = threading.Condition()
        self.broken: str | None = None
        self.ended = threading.Event()
        """Set when no process is left."""
        self.job = 0
        """Number of the job in hand."""
        self._family: set[psutil.Process] = set()
        """What the launcher has started. It may be dead, and its children nobody's, when they are to be ended."""
        self._stall_seconds = stall_seconds
        self._on_change = on_change
        self._ending = threading.Event()
        kind = devices[0].split(":")[0]
        with contextlib.ExitStack() as undo:
            self._ports = device_module.reserve_ports(kind)
            if self._ports:
                undo.callback(self._ports.close)
            self.logs = _new_log_folder(logs)
            self.folder = Path(tempfile.mkdtemp(prefix="hv15-"))
            undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
            key = secrets.token_bytes(32)
            (self.folder / "rendezvous").touch(0o600)
            with open(_private(self.folder / "key"), "wb") as file:
                file.write(key)
            self._door = Door(key, self._serve)
            undo.callback(self._door.close)
            environment = {
                **os.environ,
                **device_module.environment(kind, self._ports),
                "HV15_FOLDER": str(self.folder),
                "HV15_LOGS": str(self.logs),
                "HV15_CONTROL": "{}:{}".format(*self._door.address),
                "HV15_CONTROLLER": str(os.getpid()),
                "HV15_DEVICES": ",".join(devices),
                "HV15_BACKEND": backend,
                "PYTHONPATH": os.pathsep.join(filter(None, [str(PACK), os.environ.get("PYTHONPATH")])),
                "TMPDIR": str(self.folder),
                "OMP_NUM_THREADS": "1",
            }
            command = [
                sys.executable,
                "-m",
                "distributed.ranks.torchrun",
                "--nnodes=1",
                f"--nproc-per-node={len(devices)}",
            ]
            command += ["--max-restarts=0", "--rdzv-backend=one-host"]
            command += [f"--rdzv-endpoint={self.folder / 'rendezvous'}", "-m", worker]
            with open(_private(self.logs / "launcher.log"), "wb") as output:
                self.launcher = subprocess.Popen(
                    command,
                    env=environment,
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            undo.callback(self.launcher.kill)
            threading.Thread(target=self._watch, name="hv15-watch", daemon=True).start()
            undo.pop_all()

    def wait_ready(self, seconds: float, what: str = "come up") -> bool:
        """Wait until every rank can take a job. False when the ranks broke or ended; too long a wait breaks them."""
        limit = time.monotonic() + seconds
        with self.changed:
            while not self.broken and not all(record.state == "ready" for record in self.records):
                if self._ending.is_set():
                    return False
                if time.monotonic() > limit:
                    late = [str(record) for record in self.records if record.state != "ready"]
                    self.give_up(f"{', '.join(late)} did not {what} within {seconds:g} seconds")
                self.changed.wait(0.2)
            return not self.broken

    def send(self, type: str, raw: memoryview | None = None, **fields) -> None:
        """Send every rank the same message."""
        for record in self.records:
            try:
                if record.channel:
                    record.channel.send(type, raw, **fields)
            except BROKEN as error:
                self.give_up(f"{record} cannot be reached ({error})", record)

    def release(self, seconds: float) -> None:
        """Have the ranks, which are ready, give their memory back; return when they have, or break after `seconds`."""
        with self.changed:
            for record in self.records:
                record.state = "releasing"
        self.send("release")
        self.wait_ready(seconds, "release its memory")

    def begin(self, job: int) -> None:
        """From now on answers and progress are those of this job."""
        with self.changed:
            self.job, now = job, time.monotonic()
            for record in self.records:
                record.answer, record.state, record.moved_at = None, "busy", now
                record.done = record.total = 0
        self._on_change()

    def give_up(self, reason: str, record: RankRecord | None = None) -> None:
        """The ranks are `broken`, for this reason. Whoever waits for them, or sends to them, is woken."""
        with self.changed:
            if self.broken or self._ending.is_set():
                return
            if record:
                record.state = "failed"
            name = f"rank-{record.rank}.log" if record else "launcher.log"
            tail = "\n".join(_last_lines(self.logs / name))
            self.broken = f"{reason}.\nIts log, {self.logs / name}, ends:\n{tail}"
            self.changed.notify_all()
        log.warning("The rank group broke: %s.", reason)
        self._remember_family()
        self._close_channels()
        self._on_change()

    def end(self) -> None:
        """End every process and remove every file. Ask, then insist; returns within about five seconds."""
        with self.changed:
            begun = self._ending.is_set()
            self._ending.set()
            self.changed.notify_all()
        if begun:
            self.ended.wait()
            return
        if not self.broken:
            self.send("stop")
        self._door.close()
        self._remember_family()
        patience = 0.2 if self.broken else 3
        _, left = psutil.wait_procs(self._family, timeout=patience)
        for process in left:
            with contextlib.suppress(psutil.Error):  # it left between the two lines
                process.kill()
        try:
            self.launcher.wait(1)
        except subprocess.TimeoutExpired:
            self.launcher.kill()
            self.launcher.wait()
        psutil.wait_procs(left, timeout=1)
        self._close_channels()
        if self._ports:
            self._ports.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.ended.set()

    def _remember_family(self) -> None:
        with contextlib.suppress(psutil.Error):  # the launcher has ended
            self._family.update(psutil.Process(self.launcher.pid).children(recursive=True))

    def _close_channels(self) -> None:
        for record in self.records:
            if record.channel:
                record.channel.close()

    def _watch(self) -> None:
        """Look for signs of death, and of ranks that live but do not move, until the end."""
        due = time.monotonic()
        while not self._ending.wait(WATCH_SECONDS) and not self.broken:
            due += WATCH_SECONDS
            now = time.monotonic()
            if now - due > WATCH_SECONDS:  # this process itself stood still: nobody could be heard meanwhile
                for record in self.records:
                    record.heard_at += now - due
                    record.moved_at += now - due
                due = now
            self._check(now)

    def _check(self, now: float) -> None:
        if any(record.state == "starting" for record in self.records):
            self._remember_family()
        if self.launcher.poll() is not None:
            if self.launcher.returncode >= 0:  # it went because a rank died, whose end tells more, in a moment
                self._ending.wait(END_SECONDS + WATCH_SECONDS)
            self.give_up(f"the launcher ended with exit code {self.launcher.returncode}")
        for record in self.records:
            if record.channel and now - record.heard_at > BEATS_MISSED_SECONDS:
                self.give_up(f"{record} has not been heard of for {now - record.heard_at:.0f} seconds", record)
        busy = [record for record in self.records if record.state == "busy"]
        # While one moves the others may have nothing to do but wait for it. The one that hangs stood still first.
        if busy and all(now - record.moved_at > self._stall_seconds() for record in busy):
            record = min(busy, key=lambda record: record.moved_at)
            self.give_up(f"{record} made no progress for {now - record.moved_at:.0f} seconds", record)

    def _serve(self, channel: Channel) -> None:
        """One rank's messages, for as long as its channel lives."""
        record = None
        try:
            message, _ = channel.receive()
            record = self.records[message["rank"]]
            with self.changed:
                record.pid, record.channel = int(message["pid"]), channel
                record.heard_at = time.monotonic()
                with contextlib.suppress(psutil.Error):  # it has ended again
                    self._family.add(psutil.Process(record.pid))
            while True:
                self._hear(record, message)
                message, _ = channel.receive()
        except (*BROKEN, KeyError, IndexError, TypeError):
            if record and not self._ending.is_set() and not self.broken:
                self.give_up(f"{record}, pid {record.pid}, {self._end_of(record)}", record)

    def _hear(self, record: RankRecord, message: dict) -> None:
        with self.changed:
            record.heard_at = time.monotonic()
            before = record.state
            match message["type"]:
                case "ready" | "released":
                    record.state = "ready"
                case "beat":
                    if message["id"] == self.job:  # else a late word of the job before
                        record.done, record.total = message["done"], message["total"]
                    if message["moved"] != record.moved:
                        record.moved, record.moved_at = message["moved"], record.heard_at
                case "done" | "failed":
                    if message["id"] == self.job:
                        record.answer, record.state = message, "ready"
            self.changed.notify_all()
        if record.state != before:
            self._on_change()

    def _end_of(self, record: RankRecord) -> str:
        """How a rank ended. The launcher is its parent and knows; its log tells, a moment later."""
        limit = time.monotonic() + END_SECONDS
        while time.monotonic() < limit:
            for line in _read(self.logs / "launcher.log").splitlines():
                if f"pid: {record.pid})" in line and "exitcode:" in line:
                    return f"died with exit code {line.split('exitcode:')[1].split(')')[0].strip()}"
            time.sleep(0.05)
        return "is gone" if not psutil.pid_exists(record.pid) else "closed its connection"


def _new_log_folder(logs: Path) -> Path:
    """A folder for the logs of one start, for its owner alone. Those of long ago go."""
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in sorted(logs.glob("run-*"), key=lambda folder: folder.name)[: 1 - RUNS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=time.strftime("run-%Y%m%d-%H%M%S-"), dir=logs))


def _private(path: Path) -> int:
    """A descriptor of a new file that its owner alone may read."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _last_lines(path: Path) -> list[str]:
    return [line for line in _read(path).splitlines() if line.strip()][-LOG_LINES:]
