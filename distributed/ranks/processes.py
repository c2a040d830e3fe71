"""One set of running rank processes: started by torchrun (`torchrun`), joined over the control connections, ended for
certain.

A `RankProcesses` lives from one start to one end and is never repaired: when anything about it is in doubt it is
`broken`, with the reason, and the `Supervisor` replaces it. A thread of its own looks for signs of death and of
standstill, whatever else waits for what.
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
"""A rank that says nothing for this long is stopped or stuck beyond help (it speaks twice a second)."""
END_SECONDS = 1
"""How long the launcher may take to say how a rank ended."""
LOG_LINES = 8


class RankProcesses:
    """Rank processes for `devices`, one each. `changed` is notified, and `on_change` called, when a status changes.

    stall_seconds tells how long a rank may have a job and not move. Logs go to a new folder in `logs`, or, where there
    can be none, to the group's private folder. Only the process that made it can end it: a child that it forks has a
    copy of this object, and leaves the ranks alone.
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
        """Set when no process is left."""
        self._family: set[psutil.Process] = set()
        """What the launcher has started. It may be dead, and its children nobody's, when they are to be ended."""
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
            environment = inherited_environment(os.environ)
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

    def wait_ready(self, seconds: float, what: str = "come up") -> bool:
        """Wait until every rank can take a job. False when the ranks broke or ended; too long a wait breaks them."""
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

    def send(self, message: Message) -> None:
        """Send every rank the same message. Raises ValueError for one that cannot be encoded."""
        self.send_frame(encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Send every rank a message that was encoded before."""
        for record in self.records:
            try:
                if record.channel:
                    record.channel.send_frame(frame)
            except BROKEN as error:
                self.give_up(f"{record} cannot be reached ({error})", record)

    def release(self, seconds: float) -> None:
        """Have the ranks, which are ready, give their memory back; return when they have, or break after `seconds`."""
        with self.changed:
            for record in self.records:
                record.move(RankState.RELEASING)
        self._on_change()
        self.send(Release())
        self.wait_ready(seconds, "release its memory")

    def begin(self, job: int, state: RankState) -> None:
        """From now on answers and progress are those of this job."""
        with self.changed:
            for record in self.records:
                if record.state is not RankState.FAILED:  # it broke just now
                    record.begin(job, state)

    def give_up(self, reason: str, record: RankStatus | None = None) -> None:
        """The ranks are `broken`, for this reason. Whoever waits for them, or sends to them, is woken."""
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
        """End every process and remove every file. Ask, then insist; returns within about five seconds."""
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
            children = psutil.Process(self.launcher.pid).children(recursive=True)
            with self.changed:
                self._family.update(children)

    def _close_channels(self) -> None:
        for record in self.records:
            if record.channel:
                record.channel.shut()

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
        if any(record.state is RankState.STARTING for record in self.records):
            self._remember_family()
        if self.launcher.poll() is not None:
            if self.launcher.returncode >= 0:  # it went because a rank died, whose end tells more, in a moment
                self._ending.wait(END_SECONDS + WATCH_SECONDS)
            self.give_up(f"the launcher {describe_exit(self.launcher.returncode)}")
        for record in self.records:
            if record.channel and now - record.heard_at > BEATS_MISSED_SECONDS:
                self.give_up(f"{record} has not responded for {now - record.heard_at:.0f} seconds", record)
        busy = [record for record in self.records if record.state.has_job]
        # While one moves the others may have nothing to do but wait for it. The one that hangs stood still first.
        if busy and all(now - record.moved_at > self._stall_seconds() for record in busy):
            record = min(busy, key=lambda record: record.moved_at)
            self.give_up(f"{record} made no progress for {now - record.moved_at:.0f} seconds", record)

    def _serve(self, channel: Channel) -> None:
        """Hear one rank for as long as its channel lives."""
        try:
            record = self._introduce(channel.receive(), channel)
        except BROKEN as error:
            log.warning("Rejected a connection that is no rank of this group: %s.", error)
            return
        try:
            while True:
                self._hear(record, channel.receive())
        except (EOFError, OSError):
            self.give_up(f"{record}, pid {record.pid}, {self._end_of(record)}", record)
        except ValueError as error:
            self.give_up(f"{record}, pid {record.pid}, sent a message that is not understood ({error})", record)

    def _introduce(self, message: Message, channel: Channel) -> RankStatus:
        """Return the rank that says hello on a new channel. Raises ValueError for one that was not started here.

        A process id that a rank gives ends up among those that are killed in the end, so it has to be the launcher's
        descendant.
        """
        if not isinstance(message, Hello) or message.rank >= len(self.records):
            raise ValueError(f"it begins with {str(message)[:200]}")
        record = self.records[message.rank]
        self._remember_family()
        with self.changed:
            if message.pid not in {process.pid for process in self._family}:
                raise ValueError(f"process {message.pid} was not started by this group's launcher")
            known = [other for other in self.records if other.channel]
            if record in known or message.pid in [other.pid for other in known] or message.device != record.device:
                raise ValueError(f"{message} does not fit {record}")
            record.pid, record.channel, record.heard_at = message.pid, channel, time.monotonic()
        return record

    def _hear(self, record: RankStatus, message: Message) -> None:
        with self.changed:
            if self.broken:
                return
            before = record.state
            record.hear(message)
            self.changed.notify_all()
        if record.state is not before and not before.has_job:  # the end of a job changes the state of the group
            self._on_change()

    def _end_of(self, record: RankStatus) -> str:
        """How a rank ended. The launcher is its parent and knows; it writes it down, a moment later."""
        limit = time.monotonic() + END_SECONDS
        while time.monotonic() < limit and not self._ending.is_set() and not self.broken:
            if (exit_code := read_exit(self.folder, record.rank)) is not None:
                return describe_exit(exit_code)
            time.sleep(0.05)
        return "is gone" if not psutil.pid_exists(record.pid) else "closed its connection"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _last_lines(path: Path) -> list[str]:
    return [line for line in _read(path).splitlines() if line.strip()][-LOG_LINES:]
