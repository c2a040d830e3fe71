"""One set of running rank processes: started by torchrun, joined over the control connections, ended for certain.

A `Ranks` lives from one start to one end and is never repaired: when anything about it is in doubt it is `broken`,
with the reason, and `RankGroup` replaces it.
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
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

PACK = Path(__file__).resolve().parent.parent
BEATS_MISSED_SECONDS = 10
"""A rank that says nothing for this long is stopped or stuck beyond help (it speaks twice a second)."""
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


class Ranks:
    """Rank processes for `devices`, one each. `changed` is notified, and `on_change` called, when a record changes."""

    def __init__(
        self, devices: Sequence[str], backend: str, worker: str, number: int, on_change: Callable[[], None]
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hv15-"))
        self.records = [RankRecord(rank, device) for rank, device in enumerate(devices)]
        self.changed = threading.Condition()
        self.broken: str | None = None
        self.job = 0
        """Number of the job in hand."""
        self._on_change = on_change
        self._ending = False
        key = secrets.token_bytes(32)
        descriptor = os.open(self.folder / "key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
        self._door = Door(key, self._serve)
        environment = {
            **os.environ,
            **device_module.environment(devices[0].split(":")[0], number),
            "HV15_FOLDER": str(self.folder),
            "HV15_CONTROL": "{}:{}".format(*self._door.address),
            "HV15_DEVICES": ",".join(devices),
            "HV15_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(PACK), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
        command += [f"--nproc-per-node={len(devices)}", "-m", worker]
        with open(self.folder / "launcher.log", "wb") as output:
            self.launcher = subprocess.Popen(
                command,
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, seconds: float) -> bool:
        """Wait until every rank can take a job. False when the ranks broke; too long a wait breaks them."""
        limit = time.monotonic() + seconds
        with self.changed:
            while not self.broken and not all(record.state == "ready" for record in self.records):
                self.check(stall_seconds=None)
                if time.monotonic() > limit:
                    late = [f"rank {r.rank} ({r.device})" for r in self.records if r.state != "ready"]
                    self._break(f"{', '.join(late)} did not come up within {seconds:g} seconds", None)
                self.changed.wait(0.2)
            return not self.broken

    def send(self, type: str, raw: memoryview | None = None, **fields) -> None:
        """Send every rank the same message."""
        for record in self.records:
            try:
                if record.channel:
                    record.channel.send(type, raw, **fields)
            except BROKEN as error:
                self._break(f"rank {record.rank} ({record.device}) cannot be reached ({error})", record)

    def check(self, stall_seconds: float | None) -> None:
        """Look for signs of death and, given a limit, of ranks that live but do not move. Sets `broken`."""
        now = time.monotonic()
        if self.broken or self._ending:
            return
        if self.launcher.poll() is not None:
            self._break(f"the launcher ended with exit code {self.launcher.returncode}", None)
        for record in self.records:
            place = f"rank {record.rank} ({record.device})"
            if record.channel and now - record.heard_at > BEATS_MISSED_SECONDS:
                self._break(f"{place} has not been heard of for {now - record.heard_at:.0f} seconds", record)
            if stall_seconds and record.answer is None and now - record.moved_at > stall_seconds:
                self._break(f"{place} made no progress for {now - record.moved_at:.0f} seconds", record)

    def end(self) -> None:
        """End every process and remove every file. Ask, then insist; returns within about five seconds."""
        self._ending = True
        self.send("stop")
        self._door.close()
        pids = [record.pid for record in self.records if record.pid]
        try:
            children = psutil.Process(self.launcher.pid).children(recursive=True)
        except psutil.Error:
            children = []
        processes = {child.pid: child for child in children}
        for pid in pids:
            with contextlib.suppress(psutil.Error):  # gone already
                processes.setdefault(pid, psutil.Process(pid))
        patience = 0.2 if self.broken else 3
        _, left = psutil.wait_procs(processes.values(), timeout=patience)
        for process in left:
            with contextlib.suppress(psutil.Error):  # it left between the two lines
                process.kill()
        try:
            self.launcher.wait(1)
        except subprocess.TimeoutExpired:
            os.killpg(self.launcher.pid, signal.SIGKILL)
            self.launcher.wait()
        psutil.wait_procs(left, timeout=1)
        for record in self.records:
            if record.channel:
                record.channel.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _serve(self, channel: Channel) -> None:
        """One rank's messages, for as long as its channel lives."""
        record = None
        try:
            message, _ = channel.receive()
            record = self.records[message["rank"]]
            with self.changed:
                record.pid, record.channel = int(message["pid"]), channel
            while True:
                self._hear(record, message)
                message, _ = channel.receive()
        except (*BROKEN, KeyError, IndexError, TypeError):
            if record and not self._ending:
                code = self._exit_code(record)
                self._break(f"rank {record.rank} ({record.device}, pid {record.pid}) {code}", record)

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
                    record.answer, record.state = message, "ready"
            self.changed.notify_all()
        if record.state != before:
            self._on_change()

    def _break(self, reason: str, record: RankRecord | None) -> None:
        with self.changed:
            if self.broken or self._ending:
                return
            if record:
                record.state = "failed"
            tail = self._log_tail(record)
            self.broken = reason + (f". Its last words:\n{tail}" if tail else "")
            self.changed.notify_all()
        log.warning("The rank group broke: %s", reason)
        self._on_change()

    def _exit_code(self, record: RankRecord) -> str:
        """How a rank ended. The launcher is its parent and knows; its log tells."""
        for _ in range(20):
            if record.pid and not psutil.pid_exists(record.pid):
                break
            time.sleep(0.05)
        text = _read(self.folder / "launcher.log")
        for line in text.splitlines():
            if f"pid: {record.pid}" in line and "exitcode:" in line:
                return f"died with exit code {line.split('exitcode:')[1].split(')')[0].strip()}"
        return "died"

    def _log_tail(self, record: RankRecord | None) -> str:
        name = f"rank-{record.rank}.log" if record else "launcher.log"
        lines = [line for line in _read(self.folder / name).splitlines() if line.strip()]
        return "\n".join(lines[-LOG_LINES:])


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
