"""One set of rank processes: start them through torchrun (`torchrun`), talk to them over the control connections, and
end them.

A `RankProcesses` is started once and ended once. It is never repaired: after any failure it is `broken`, with the
reason, and the `Supervisor` replaces it. A separate thread detects processes that have died or hang.
"""

import contextlib
import logging
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from . import devices as device_module
from .environment import RankEnvironment, compiler_cache, inherited_environment, python_command, search_path
from .exits import describe_exit, read_exit
from .listener import Listener
from .logs import LAUNCHER_LOG, new_folder, open_launcher_log
from .protocol import BROKEN, Channel, Hello, Message, Release, Stop, encode
from .states import RankState
from .status import RankStatus

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.5
BEATS_MISSED_SECONDS = 10
"""Time without a heartbeat after which a rank is considered hung. Ranks send two heartbeats per second."""
END_SECONDS = 1
"""Time limit for the launcher to write the exit code of a rank."""
LOG_LINES = 8


class RankProcesses:
    """Rank processes, one per device. `changed` is notified, and `on_change` called, when the status of a rank changes.

    stall_seconds: returns the time limit for a job without progress. Logs are written to a new folder in `logs`, or to
    the group's private folder if that is not possible. Only the process that created this object can end the ranks: a
    forked child has a copy of the object, on which `end` does nothing.
    """

    def __init__(
        self,
        devices: Sequence[str],
        backend: str,
        worker: str,
        logs: Path | None,
        stall_seconds: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self.records = [RankStatus(rank, device) for rank, device in enumerate(devices)]
        self.changed = threading.Condition()
        self.broken: str | None = None
        self.ended = threading.Event()
        """Set when all processes have ended."""
        self._family: set[psutil.Process] = set()
        """The launcher's descendants. They are recorded because the launcher may die before they are ended."""
        self._stall_seconds = stall_seconds
        self._on_change = on_change
        self._ending = threading.Event()
        self._owner = os.getpid()
        kind = device_module.kind_of(devices[0])
        with contextlib.ExitStack() as undo:
            self._ports = device_module.reserve_ports(kind)
            if self._ports:
                undo.callback(self._ports.close)
            self.folder = Path(tempfile.mkdtemp(prefix="hv15-"))
            undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.logs = new_folder(logs, self.folder)
            key = secrets.token_bytes(32)
            (self.folder / "rendezvous").touch(0o600)
            with open(os.open(self.folder / "key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(key)
            self.listener = Listener(key, self._serve)
            undo.callback(self.listener.close)
            start = RankEnvironment(
                folder=self.folder,
                logs=self.logs,
                control=self.listener.address,
                controller=self._owner,
                devices=tuple(devices),
                backend=backend,
                search_path=search_path(),
            )
            # Without a mode of reproducibility, MKL's sums depend on the alignment of memory on some AMD processors.
            environment = {"MKL_CBWR": "AUTO"} | inherited_environment(os.environ)
            environment |= device_module.environment(kind, self._ports)
            environment |= compiler_cache(os.environ, self.folder)
            environment |= start.to_env() | {"TMPDIR": str(self.folder), "OMP_NUM_THREADS": "1"}
            with open(open_launcher_log(self.logs), "wb") as output:
                self.launcher = subprocess.Popen(
                    python_command("distributed.ranks.torchrun", worker),
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

    def wait_ready(self, seconds: float, what: str = "become ready") -> bool:
        """Wait until every rank is ready. Return False if the ranks broke or ended; after `seconds` they are broken."""
        limit = time.monotonic() + seconds
        late = self._not_ready()
        with self.changed:
            while not self.broken and (late := self._not_ready()) and time.monotonic() < limit:
                if self._ending.is_set():
                    return False
                self.changed.wait(0.2)
        if late and not self.broken:
            self.give_up(f"{', '.join(map(str, late))} did not {what} within {seconds:g} seconds")
        return not self.broken

    def _not_ready(self) -> list[RankStatus]:
        return [record for record in self.records if record.state is not RankState.READY]

    def _not_failed(self) -> list[RankStatus]:
        """Return the ranks that have not failed. One may have failed a moment ago."""
        return [record for record in self.records if record.state is not RankState.FAILED]

    def send(self, message: Message) -> None:
        """Send the same message to every rank. Raises ValueError if it cannot be encoded."""
        self.send_frame(encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Send an encoded message to every rank."""
        for record in self.records:
            try:
                if record.channel:
                    record.channel.send_frame(frame)
            except BROKEN as error:
                self.give_up(f"{record} cannot be reached ({error})", record)

    def release(self, seconds: float) -> None:
        """Free the device memory of all ranks, which must be ready. If this takes longer than `seconds`, they break."""
        with self.changed:
            for record in self._not_failed():
                record.move(RankState.RELEASING)
        self._on_change()
        self.send(Release())
        self.wait_ready(seconds, "release its memory")

    def begin(self, job: int, state: RankState) -> None:
        """Start a new job: answers and progress now refer to it."""
        with self.changed:
            for record in self._not_failed():
                record.begin(job, state)

    def give_up(self, reason: str, record: RankStatus | None = None) -> None:
        """Mark the ranks as `broken`, for this reason. Threads that wait for them or send to them are woken.

        record: the rank that caused it, whose log is quoted; by default the launcher's log is quoted.
        """
        with self.changed:
            if self.broken or self._ending.is_set():
                return
            if record:
                record.move(RankState.FAILED)
            name = f"rank-{record.rank}.log" if record else LAUNCHER_LOG
            tail = "\n".join(_last_lines(self.logs / name))
            self.broken = f"{reason}.\nIts log, {self.logs / name}, ends:\n{tail}"
            self.changed.notify_all()
        log.warning("The rank group broke: %s.", reason)
        self._remember_family()
        self._close_channels()
        self._on_change()

    def end(self) -> None:
        """End all processes and remove all files. Processes that do not exit are killed. Takes at most five seconds."""
        if os.getpid() != self._owner:
            return
        with self.changed:
            begun = self._ending.is_set()
            self._ending.set()
            self.changed.notify_all()
        if begun:
            self.ended.wait()
            return
        if not self.broken:
            self.send(Stop())
        self.listener.close()
        self._remember_family()
        patience = 0.2 if self.broken else 3
        with self.changed:
            family = list(self._family)
        _, left = psutil.wait_procs(family, timeout=patience)
        for process in left:
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
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
            children = psutil.Process(self.launcher.pid).children(recursive=True)
            with self.changed:
                self._family.update(children)

    def _close_channels(self) -> None:
        for record in self.records:
            if record.channel:
                record.channel.shut()

    def _watch(self) -> None:
        """Check for processes that have died or hang, until `end`."""
        due = time.monotonic()
        while not self._ending.wait(WATCH_SECONDS) and not self.broken:
            due += WATCH_SECONDS
            now = time.monotonic()
            if now - due > WATCH_SECONDS:  # this process was suspended and could not receive messages
                for record in self.records:
                    record.heard_at += now - due
                    record.moved_at += now - due
                due = now
            self._check(now)

    def _check(self, now: float) -> None:
        if any(record.state is RankState.STARTING for record in self.records):
            self._remember_family()
        if self.launcher.poll() is not None:
            if self.launcher.returncode >= 0:  # it exits after a rank died; wait for that rank's exit code
                self._ending.wait(END_SECONDS + WATCH_SECONDS)
            self.give_up(f"the launcher {describe_exit(self.launcher.returncode)}")
        for record in self.records:
            if record.channel and now - record.heard_at > BEATS_MISSED_SECONDS:
                self.give_up(f"{record} has not responded for {now - record.heard_at:.0f} seconds", record)
        busy = [record for record in self.records if record.state.has_job]
        # While one rank makes progress, the others may wait for it. The hung rank is the one that stopped first.
        if busy and all(now - record.moved_at > self._stall_seconds() for record in busy):
            record = min(busy, key=lambda record: record.moved_at)
            self.give_up(f"{record} made no progress for {now - record.moved_at:.0f} seconds", record)

    def _serve(self, channel: Channel) -> None:
        """Receive the messages of one rank until its channel ends."""
        try:
            record = self._introduce(channel.receive(), channel)
        except BROKEN as error:
            log.warning("Refused a connection that is not a rank of this group: %s.", error)
            return
        try:
            while True:
                self._hear(record, channel.receive())
        except (EOFError, OSError):
            self.give_up(f"{record}, pid {record.pid}, {self._end_of(record)}", record)
        except ValueError as error:
            self.give_up(f"{record}, pid {record.pid}, sent an invalid message ({error})", record)

    def _introduce(self, message: Message, channel: Channel) -> RankStatus:
        """Return the rank that sent `Hello` on a new channel. Raises ValueError if it was not started by this object.

        The process id in the message must be that of a descendant of the launcher, because `end` kills the process.
        """
        if not isinstance(message, Hello) or message.rank >= len(self.records):
            raise ValueError(f"its first message is {str(message)[:200]}")
        record = self.records[message.rank]
        self._remember_family()
        with self.changed:
            if message.pid not in {process.pid for process in self._family}:
                raise ValueError(f"process {message.pid} was not started by this group's launcher")
            known = [other for other in self.records if other.channel]
            if record in known or message.pid in [other.pid for other in known] or message.device != record.device:
                raise ValueError(f"{message} does not match {record}")
            record.pid, record.channel, record.heard_at = message.pid, channel, time.monotonic()
        return record

    def _hear(self, record: RankStatus, message: Message) -> None:
        with self.changed:
            if self.broken:
                return
            before = record.state
            record.hear(message)
            self.changed.notify_all()
        if (
            record.state is not before and not before.has_job
        ):  # at the end of a job, the group's change of state is reported
            self._on_change()

    def _end_of(self, record: RankStatus) -> str:
        """Describe how a rank ended. The launcher, its parent, writes the exit code shortly after."""
        limit = time.monotonic() + END_SECONDS
        while time.monotonic() < limit and not self._ending.is_set() and not self.broken:
            if (exit_code := read_exit(self.folder, record.rank)) is not None:
                return describe_exit(exit_code)
            time.sleep(0.05)
        return "has exited" if not psutil.pid_exists(record.pid) else "closed its connection"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _last_lines(path: Path) -> list[str]:
    return [line for line in _read(path).splitlines() if line.strip()][-LOG_LINES:]
