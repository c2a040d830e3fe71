"""The handle on a persistent group of ranks, one process for each device.

    with RankGroup(devices=["cuda:0", "cuda:1"]) as group:
        frames = group.decode(latent, vae="path/to/vae", mode="seamless")

The group starts in the background, keeps its processes and weights between decodes, and replaces processes that die
or hang: a decode that meets a broken group is run once more on a new one. Bad input is refused before the ranks hear
of it. All methods may be called from any thread; decodes queue.
"""

import itertools
import logging
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from . import devices as device_module
from .engine import Cancelled
from .errors import GroupError, JobError
from .frames import FramePool
from .launch import Ranks
from .plan import DTYPES, Job, check_job, check_latent
from .states import State, follow
from .weights import Checkpoint, fingerprint, open_checkpoint, share_state_dict

log = logging.getLogger(__name__)

KEEP = ("keep", "release", "stop")
GRACE_SECONDS = 10
"""How long the other ranks have to answer after one of them failed; then they hang in wait for it."""
MEMORY_TRIES = 4

_numbers = itertools.count()


class RankGroup:
    """A persistent group of ranks. See the module's docstring.

    devices: "auto", "cuda:0,cuda:1", "npu:0-3", "cpu,cpu", or a list. backend: "auto", or one that torch.distributed
    knows. dtype: what ranks compute in, "auto" for bfloat16 on accelerators and float32 on the CPU. keep_loaded: what
    happens after a decode: "keep" weights on the devices, "release" them, or "stop" the processes. start_timeout:
    seconds for the ranks to come up. stall_timeout: seconds without any progress after which a rank counts as hung.
    on_change is called, in any thread, whenever the group's status changes. worker names the module that ranks run.

    Raises ValueError for devices or options that cannot be.
    """

    def __init__(
        self,
        devices: str | Sequence[str] = "auto",
        *,
        backend: str = "auto",
        dtype: str = "auto",
        keep_loaded: str = "keep",
        start_timeout: float = 180,
        stall_timeout: float = 120,
        on_change: Callable[[], None] | None = None,
        worker: str = "distributed.worker",
    ) -> None:
        self.devices = device_module.parse_devices(devices)
        device_module.check_devices(self.devices)
        if dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype is {dtype!r}; it must be auto or one of {', '.join(DTYPES)}.")
        if keep_loaded not in KEEP:
            raise ValueError(f"keep_loaded is {keep_loaded!r}; it must be one of {', '.join(KEEP)}.")
        kind = self.devices[0].split(":")[0]
        self.id = secrets.token_hex(4)
        self.dtype = device_module.automatic_dtype(kind) if dtype == "auto" else dtype
        self.keep_loaded, self.backend = keep_loaded, backend
        self.start_timeout, self.stall_timeout = start_timeout, stall_timeout
        self.on_change = on_change or (lambda: None)
        self._worker, self._number = worker, next(_numbers)
        self._state = State.STOPPED
        self._lock = threading.RLock()
        self._decoding = threading.Lock()
        self._ranks: Ranks | None = None
        self._error: str | None = None
        self._starting: threading.Thread | None = None
        self._cancel = threading.Event()
        self._jobs = itertools.count(1)
        self._folder = tempfile.TemporaryDirectory(prefix="hv15-group-")
        self._pool = FramePool(Path(self._folder.name))
        self._handed: tuple[str, Path] | None = None

    def __enter__(self) -> "RankGroup":
        self.start(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, wait: bool = False) -> None:
        """Bring the ranks up in the background, unless they are up. With `wait`, return when they are ready.

        Raises GroupError, with `wait`, where they do not come up.
        """
        with self._lock:
            if self._state in (State.STOPPED, State.FAILED):
                self._move(State.STARTING)
                self._launch()
            thread = self._starting
        if wait:
            thread.join()
            if self._state in (State.FAILED, State.STOPPED):
                raise GroupError(self._error or "The rank group was stopped while it started.")

    def decode(
        self,
        latent: Tensor,
        vae: str | Path | Mapping[str, Tensor],
        mode: str = "seamless",
        *,
        tile_size: int = 256,
        overlap: int = 64,
        memory: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        timeout: float | None = None,
        cancelled: Callable[[], bool] | None = None,
        frames_started: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Decode `latent`, [B, C, t, h, w] in VAE space, to frames [B, 4t-3, 16h, 16w, 3], float32 in 0..1 on the CPU.

        vae: a checkpoint's path (either layout, file or diffusers folder) or a state dict. tile_size and overlap, in
        pixels, count in "tiled" mode. memory: bytes that each rank may use. progress(done, total) and cancelled() are
        called on this thread, several times a second; frames_started gets the frames before they are filled.
        timeout: seconds for the whole decode.

        Raises JobError for input that cannot be decoded and memory that does not suffice, GroupError where the group
        broke twice, Cancelled after `cancel`, TimeoutError.
        """
        checkpoint, path = self._resolve(vae)
        job = self._job(latent, checkpoint, mode, tile_size, overlap, memory)
        latent = latent.detach().to("cpu", torch.float32).contiguous()
        limit = None if timeout is None else time.monotonic() + timeout
        with self._decoding:
            self._cancel.clear()
            frames, place = self._pool.allocate(job.frames_shape)
            if frames_started:
                frames_started(frames)
            watch = _Watch(progress, cancelled, limit)
            try:
                self._decode(job, latent, path, place, watch)
            finally:
                self._after()
            return frames

    def cancel(self) -> None:
        """End the decode in hand: it raises Cancelled within a chunk, and the ranks stay warm."""
        self._cancel.set()

    def release(self) -> None:
        """Give back device memory, and frame buffers that nobody holds; keep processes. Waits for a decode in hand."""
        with self._decoding:
            self._release()

    def stop(self) -> None:
        """End the processes. The next call that needs them starts them again."""
        self.cancel()
        with self._lock:
            ranks, self._ranks = self._ranks, None
            if self._state is not State.STOPPED:
                self._move(State.STOPPED)
        if ranks:
            ranks.end()
        self._pool.trim()

    def status(self) -> dict:
        """What `GET /hv15/groups` lists: id, state, error, and of each rank its rank, pid, device, state, progress."""
        with self._lock:
            records = self._ranks.records if self._ranks else []
            known = {record.rank: record for record in records}
            return {
                "id": self.id,
                "state": self._state.value,
                "error": self._error,
                "dtype": self.dtype,
                "ranks": [
                    {
                        "rank": rank,
                        "pid": known[rank].pid if rank in known else None,
                        "device": device,
                        "state": known[rank].state if rank in known else "stopped",
                        "done": known[rank].done if rank in known else 0,
                        "total": known[rank].total if rank in known else 0,
                    }
                    for rank, device in enumerate(self.devices)
                ],
            }

    def _move(self, state: State) -> None:
        with self._lock:
            self._state = follow(self._state, state)
            if state is not State.FAILED:
                self._error = None
        self.on_change()

    def _launch(self) -> None:
        """Start processes; a thread waits for them and sets the state."""
        self._ranks = ranks = Ranks(self.devices, self.backend, self._worker, self._number, self.on_change)

        def wait() -> None:
            if ranks.wait_ready(self.start_timeout):
                with self._lock:
                    if self._ranks is ranks:
                        self._move(State.READY)
                return
            ranks.end()
            with self._lock:
                if self._ranks is ranks:
                    self._move(State.FAILED)
                    self._error = f"The rank group did not start: {ranks.broken}"

        self._starting = threading.Thread(target=wait, name="hv15-start", daemon=True)
        self._starting.start()

    def _resolve(self, vae: str | Path | Mapping[str, Tensor]) -> tuple[Checkpoint, Path]:
        """The checkpoint, and the file or folder that ranks map. Weights in memory are written once."""
        try:
            if isinstance(vae, str | Path):
                return open_checkpoint(vae), Path(vae)
            mark = fingerprint(vae)
            if self._handed is None or self._handed[0] != mark:
                path = share_state_dict(vae, self._folder.name, f"vae-{secrets.token_hex(4)}")
                if self._handed:
                    self._handed[1].unlink(missing_ok=True)
                self._handed = mark, path
            return open_checkpoint(self._handed[1]), self._handed[1]
        except (ValueError, OSError) as error:
            raise JobError(str(error)) from error

    def _job(
        self, latent: Tensor, checkpoint: Checkpoint, mode: str, tile_size: int, overlap: int, memory: int | None
    ) -> Job:
        try:
            job = Job(tuple(latent.shape), mode, tile_size, overlap, self.dtype, memory)
            check_job(job, len(self.devices))
            check_latent(latent, checkpoint.latent_channels)
        except ValueError as error:
            raise JobError(str(error)) from error
        return job

    def _decode(self, job: Job, latent: Tensor, path: Path, place: str, watch: "_Watch") -> None:
        """Run the job: again with less memory while a rank lacks it, and once on a new group if this one breaks."""
        restarted = False
        tries = 1
        while True:
            try:
                ranks = self._ready(watch)
                self._move(State.BUSY)
                return self._run(ranks, job, latent, path, place, watch)
            except GroupError as error:
                if restarted or self._state is State.STOPPED:
                    self._fail(str(error))
                    raise
                restarted = True
                log.warning("Restarting the rank group to run the job again: %s", str(error).split("\n")[0])
                self._recover()
            except _Memory as error:
                if tries == MEMORY_TRIES:
                    raise JobError(error.words) from None
                tries += 1
                job = replace(job, memory=max(1, (job.memory or error.free) * 3 // 4))
                log.warning("%s Trying again with %.2f GiB.", error.words, job.memory / 2**30)

    def _ready(self, watch: "_Watch") -> Ranks:
        """The ranks, once they are up. Raises GroupError where they do not come up, Cancelled."""
        self.start()
        while self._starting.is_alive():
            self._starting.join(0.1)
            self._check(watch)
        with self._lock:
            if self._ranks is None or self._state is not State.READY:
                raise GroupError(self._error or "The rank group was stopped.")
            if self._ranks.broken:
                raise GroupError(self._ranks.broken)
            return self._ranks

    def _run(self, ranks: Ranks, job: Job, latent: Tensor, path: Path, place: str, watch: "_Watch") -> None:
        id = next(self._jobs)
        with ranks.changed:
            ranks.job, now = id, time.monotonic()
            for record in ranks.records:
                record.answer, record.state, record.moved_at = None, "busy", now
                record.done = record.total = 0
        raw = memoryview(latent.numpy()).cast("B")
        ranks.send("job", raw, id=id, job=asdict(job), checkpoint=str(path), frames=place)
        grace = None
        asked = False
        stop: BaseException | None = None
        while True:
            with ranks.changed:
                ranks.changed.wait(0.1)
                answers = [record.answer for record in ranks.records]
                done, total = sum(r.done for r in ranks.records), sum(r.total for r in ranks.records)
            if all(answers):
                break
            if self._state is State.STOPPED:
                raise Cancelled
            ranks.check(self.stall_timeout)
            if ranks.broken:
                raise GroupError(ranks.broken)
            if any(a and a["type"] == "failed" for a in answers):
                grace = grace or time.monotonic() + GRACE_SECONDS
                if time.monotonic() > grace:
                    raise GroupError(self._first_failure(ranks) + " The other ranks were left waiting for it.")
            try:
                if stop is None:
                    self._check(watch)
                    watch.progress(done, total)
            except (Exception, KeyboardInterrupt) as error:  # the caller's callbacks may raise an interruption
                stop = error
            if stop and not asked:
                asked = True
                ranks.send("cancel", id=id)
        self._move(State.READY)
        if stop:
            raise stop
        failed = [answer for answer in answers if answer["type"] == "failed"]
        if not failed:
            watch.progress(total, total)
            return
        if all(answer["kind"] == "cancelled" for answer in failed):
            raise Cancelled
        memory = [answer for answer in failed if answer["kind"] == "memory"]
        if memory:
            tightest = min(memory, key=lambda answer: answer["free"])
            raise _Memory(tightest["message"], tightest["free"])
        raise JobError(self._first_failure(ranks))

    def _first_failure(self, ranks: Ranks) -> str:
        record = next(r for r in ranks.records if r.answer and r.answer["type"] == "failed")
        return f"Rank {record.rank} ({record.device}) failed: {record.answer['message']}"

    def _check(self, watch: "_Watch") -> None:
        if self._cancel.is_set() or watch.cancelled():
            raise Cancelled
        if watch.limit is not None and time.monotonic() > watch.limit:
            raise TimeoutError("The decode took longer than its timeout; it was cancelled.")

    def _recover(self) -> None:
        """Replace the ranks by new ones."""
        with self._lock:
            if self._state in (State.FAILED, State.STOPPED):
                return  # `start` begins anew from there
            self._move(State.RECOVERING)
            ranks, self._ranks = self._ranks, None
        if ranks:
            ranks.end()
        with self._lock:
            if self._state is State.RECOVERING:
                self._launch()

    def _fail(self, error: str) -> None:
        with self._lock:
            ranks, self._ranks = self._ranks, None
            if self._state not in (State.STOPPED, State.FAILED):
                self._move(State.FAILED)
                self._error = error
        if ranks:
            ranks.end()

    def _after(self) -> None:
        if self.keep_loaded == "release":
            self._release()
        elif self.keep_loaded == "stop":
            self.stop()

    def _release(self) -> None:
        with self._lock:
            ranks = self._ranks
        if ranks and not ranks.broken:
            ranks.send("release")
        self._pool.trim()


class _Memory(Exception):
    """A rank lacks memory."""

    def __init__(self, words: str, free: int) -> None:
        super().__init__(words)
        self.words, self.free = words, free


class _Watch:
    """The caller's side of a decode in hand."""

    def __init__(
        self, progress: Callable[[int, int], None] | None, cancelled: Callable[[], bool] | None, limit: float | None
    ) -> None:
        self.progress = progress or (lambda done, total: None)
        self.cancelled = cancelled or (lambda: False)
        self.limit = limit
