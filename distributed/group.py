"""The handle on a persistent group of ranks, one process for each device.

    with RankGroup(devices=["cuda:0", "cuda:1"]) as group:
        frames = group.decode(latent, vae="path/to/vae", mode="seamless")

The group starts in the background, keeps its processes and weights between decodes, and replaces processes that die
or hang, at once: a decode in hand is run once more on the new ones. Bad input is refused before the ranks hear of it.
All methods may be called from any thread; decodes queue.
"""

import contextlib
import itertools
import logging
import math
import operator
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from .errors import Cancelled, GroupError, JobError
from .ranks import devices as device_module
from .ranks.buffers import FramePool, place_of
from .ranks.logs import default_folder
from .ranks.processes import RankRecord, Ranks
from .ranks.protocol import BYTES_LIMIT
from .ranks.states import State, follow
from .vae.checkpoint import Checkpoint, open_checkpoint
from .vae.handover import SharedWeights, fingerprint
from .vae.job import DTYPES, DecodeRequest, check_latent, check_request

log = logging.getLogger(__name__)

KEEP = ("keep", "release", "stop")
GRACE_SECONDS = 3
"""How long the other ranks have to answer after one of them failed; then they hang in wait for it."""
RELEASE_SECONDS = 15
TELL_SECONDS = 0.5
"""How often progress, which changes all the time, is told as a change of the group."""
MEMORY_TRIES = 4


class RankGroup:
    """A persistent group of ranks. See the module's docstring.

    devices: "auto", "cuda:0,cuda:1", "npu:0-3", "cpu,cpu", or a list. backend: "auto", or one that torch.distributed
    knows. options: see `configure`. on_change is called, in any thread, whenever the group's status changes; it must
    not wait for another thread that uses the group. logs: the folder for the ranks' logs, by default in the user's
    cache. worker names the module that ranks run.

    Raises ValueError for devices or options that cannot be.
    """

    def __init__(
        self,
        devices: str | Sequence[str] = "auto",
        *,
        backend: str = "auto",
        on_change: Callable[[], None] | None = None,
        logs: str | Path | None = None,
        worker: str = "distributed.worker",
        **options: object,
    ) -> None:
        self.devices = device_module.parse_devices(devices)
        device_module.check_devices(self.devices, backend)
        self.backend = backend
        self.configure(**options)
        self.id = secrets.token_hex(4)
        self.on_change = on_change or (lambda: None)
        self._worker, self._logs = worker, Path(logs).absolute() if logs else default_folder()
        self._state = State.STOPPED
        self._lock = threading.RLock()
        self._decoding = threading.Lock()
        self._ranks: Ranks | None = None
        self._error: str | None = None
        self._starting: threading.Thread | None = None
        self._cancel = threading.Event()
        self._jobs = itertools.count(1)
        self._pool = FramePool()
        self._handed: SharedWeights | None = None
        self._loaded: tuple[Ranks, str, str] | None = None
        """The ranks that hold a checkpoint, or have read ahead in it, its identity and the dtype."""
        self._unwanted = threading.Event()
        """Set while somebody waits for the ranks to give their memory back: what loads ahead for later ends."""
        self.decoded = False
        """Whether ranks may have what a decode leaves on their devices; else they have loaded ahead, or nothing."""
        self._spare = True
        """Whether ranks that break while idle are replaced with nobody asking: once, until they have done a job."""

    def __enter__(self) -> "RankGroup":
        self.start(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def configure(
        self,
        *,
        dtype: str = "auto",
        keep_loaded: str = "keep",
        start_timeout: float = 180,
        stall_timeout: float = 120,
    ) -> None:
        """Set the options that a living group may change; a decode in hand keeps the dtype that it began with.

        dtype: what ranks compute in, "auto" for what suits their devices. keep_loaded: what happens after a decode:
        "keep" weights on the devices, "release" them, or "stop" the processes. start_timeout: seconds for the ranks to
        come up. stall_timeout: seconds without any progress after which a rank counts as hung. Raises ValueError.
        """
        if dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype is {dtype!r}; it must be auto or one of {', '.join(DTYPES)}.")
        if keep_loaded not in KEEP:
            raise ValueError(f"keep_loaded is {keep_loaded!r}; it must be one of {', '.join(KEEP)}.")
        self.dtype = device_module.automatic_dtype(self.devices) if dtype == "auto" else dtype
        self.keep_loaded = keep_loaded
        self.start_timeout, self.stall_timeout = start_timeout, stall_timeout

    def start(self, wait: bool = False) -> None:
        """Bring the ranks up in the background, unless they are up. With `wait`, return when they are ready.

        Raises GroupError, with `wait`, where they do not come up.
        """
        with self._lock:
            if self._state in (State.STOPPED, State.FAILED):
                self._spare = True
                self._begin(State.STARTING)
            thread = self._starting
        if wait:
            if thread:
                thread.join()
            with self._lock:
                if self._state in (State.FAILED, State.STOPPED):
                    raise GroupError(self._error or "The rank group was stopped while it started.")

    def preload(self, vae: str | Path | Mapping[str, Tensor], shared: Collection[str] = ()) -> None:
        """Have the ranks come up and load this checkpoint, in the background, for the decode that is to come.

        On the devices in `shared` it is only read into the host's memory: theirs is wanted for other things until
        then. What goes wrong here the decode will tell.
        """
        self.start()
        threading.Thread(target=self._preload, args=(vae, shared), name="hv15-preload", daemon=True).start()

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
        notice: Callable[[str], None] | None = None,
    ) -> Tensor:
        """Decode `latent`, [B, C, t, h, w] in VAE space, to frames [B, 4t-3, 16h, 16w, 3], float32 in 0..1 on the CPU.

        vae: a checkpoint's path (either layout, file or diffusers folder) or a state dict. tile_size and overlap, in
        pixels, count in "tiled" mode. memory: bytes that each rank may use. progress(done, total) and cancelled() are
        called on this thread, several times a second; frames_started gets the frames before they are filled,
        notice a sentence for the user where the decode is run again. timeout: seconds for the whole decode.

        Raises JobError for input that cannot be decoded and memory that does not suffice, GroupError where the group
        broke twice, Cancelled after `cancel`, TimeoutError.
        """
        checkpoint, path, _held = self._resolve(vae)
        job = self._job(latent, checkpoint, mode, tile_size, overlap, memory)
        latent = latent.detach().to("cpu", torch.float32).contiguous()
        watch = _Watch(progress, cancelled, notice, None if timeout is None else time.monotonic() + timeout)
        with self._turn(watch):
            try:
                frames, place = self._pool.allocate(job.frames_shape)
            except OSError as error:
                size = 4 * math.prod(job.frames_shape) / 2**30
                raise JobError(f"There is no room for the frames, {size:.2f} GiB of shared memory: {error}.") from error
            except MemoryError as error:
                raise JobError(f"Not enough memory for the frames: {error} Decode fewer frames at a time.") from error
            if frames_started:
                frames_started(frames)
            try:
                self._decode(job, latent, checkpoint, path, place, watch)
            finally:
                self._after()
            return frames

    def cancel(self) -> None:
        """End the decode in hand: it raises Cancelled within a chunk, and the ranks stay warm."""
        self._cancel.set()

    def release(self) -> None:
        """Give back device memory, and frame buffers that nobody holds; keep processes.

        Waits for a decode in hand, so none of its callbacks may call this; loading ahead is ended.
        """
        self._unwanted.set()
        with self._decoding:
            self._unwanted.clear()
            self._release()

    def stop(self) -> None:
        """End the processes. The next call that needs them starts them again."""
        self.cancel()
        with self._lock:
            ranks, self._ranks = self._ranks, None
            self._move(State.STOPPED)
            self._handed, self.decoded = None, False
            starting = self._starting
        if ranks:
            ranks.end()
        if starting and starting is not threading.current_thread():
            starting.join()  # what it has begun it also ends
        self._pool.trim()

    def status(self) -> dict:
        """What `GET /hv15/groups` lists: id, state, error, and of each rank its rank, pid, device, state, progress."""
        with self._lock:
            records = self._ranks.records if self._ranks else ()
            known = {record.rank: record for record in records}
            absent = "starting" if self._state in (State.STARTING, State.RECOVERING) else "stopped"
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
                        "state": known[rank].state if rank in known else absent,
                        "done": known[rank].done if rank in known else 0,
                        "total": known[rank].total if rank in known else 0,
                    }
                    for rank, device in enumerate(self.devices)
                ],
            }

    def _move(self, state: State, error: str | None = None) -> None:
        with self._lock:
            self._state = follow(self._state, state)
            self._error = error
        self._tell()

    def _tell(self) -> None:
        """Tell whoever listens that the status has changed."""
        try:
            self.on_change()
        except Exception:
            log.exception("What a rank group tells its changes to failed.")

    def _begin(self, state: State) -> None:
        """Replace the ranks, if there are any, by new ones, in the background. The lock is held."""
        old, self._ranks = self._ranks, None
        self._starting = threading.Thread(target=self._bring_up, args=(old,), name="hv15-start", daemon=True)
        self._move(state)
        try:
            self._starting.start()
        except RuntimeError as error:  # there can be no more threads
            self._starting = None
            if old:
                old.end()
            self._fail(f"The rank group cannot be started: {error}.")

    def _bring_up(self, old: Ranks | None) -> None:
        if old:
            old.end()
        with self._lock:
            if not self._wanted():
                return
        try:
            ranks = Ranks(
                self.devices,
                self.backend,
                self._worker,
                self._logs,
                lambda: self.stall_timeout,
                lambda: self._changed(ranks),
            )
        except Exception as error:
            words = error.strerror if isinstance(error, OSError) else error
            self._settle(None, f"The rank group cannot be started: {words}.\n{error!r}")
            return
        with self._lock:
            if self._wanted():
                self._ranks = ranks
        if self._ranks is ranks and ranks.wait_ready(self.start_timeout):
            self._settle(ranks, None)
        else:
            ranks.end()
            self._settle(None, f"The rank group did not start: {ranks.broken}")

    def _wanted(self) -> bool:
        """Whether what this thread starts is still waited for. The lock is held."""
        starting = self._state in (State.STARTING, State.RECOVERING)
        return starting and self._starting is threading.current_thread()

    def _settle(self, ranks: Ranks | None, error: str | None) -> None:
        with self._lock:
            if self._wanted():
                self._ranks = ranks
                self._move(State.FAILED if error else State.READY, error)
        if ranks:
            self._changed(ranks)  # they may have broken just now

    def _changed(self, ranks: Ranks) -> None:
        """Ranks changed, in some thread. Idle ones that broke are replaced, once, until a decode has shown them fit."""
        with self._lock:
            if ranks.broken and self._ranks is ranks and self._state is State.READY:
                if self._spare:
                    self._spare = False
                    self._begin(State.RECOVERING)
                else:
                    self._fail(ranks.broken)
        self._tell()

    def _fail(self, error: str) -> None:
        """Give up until somebody asks again. The lock is held."""
        ranks, self._ranks = self._ranks, None
        self._move(State.FAILED, error)
        if ranks:
            threading.Thread(target=ranks.end, name="hv15-end", daemon=True).start()

    def _resolve(self, vae: str | Path | Mapping[str, Tensor]) -> tuple[Checkpoint, Path, SharedWeights | None]:
        """The checkpoint, the file or folder that ranks map, and what keeps it there.

        Weights in memory are written once. The decodes in hand and in the queue may each have weights of their own.
        """
        try:
            if isinstance(vae, str | Path):
                path = Path(vae).absolute()  # ranks have another working directory
                return open_checkpoint(path), path, None
            mark = fingerprint(vae)
            with self._lock:
                handed = self._handed
            if handed is None or handed.mark != mark:
                handed = SharedWeights(vae, mark)
                with self._lock:
                    self._handed = handed
            return open_checkpoint(handed.path), handed.path, handed
        except (ValueError, OSError, MemoryError) as error:
            raise JobError(str(error)) from error

    def _job(
        self, latent: Tensor, checkpoint: Checkpoint, mode: str, tile_size: int, overlap: int, memory: int | None
    ) -> DecodeRequest:
        try:
            pixels = _whole("tile_size", tile_size), _whole("overlap", overlap)
            budget = None if memory is None else _whole("memory", memory)
            job = DecodeRequest(tuple(latent.shape), mode, *pixels, self.dtype, budget)
            check_request(job, len(self.devices))
            check_latent(latent, checkpoint.latent_channels)
        except ValueError as error:
            raise JobError(str(error)) from error
        if latent.numel() * 4 > BYTES_LIMIT:
            raise JobError(
                f"The latent has shape {list(latent.shape)}, {latent.numel() * 4 / 2**30:.1f} GiB; "
                f"{BYTES_LIMIT / 2**30:g} GiB is the most. Decode it in parts."
            )
        return job

    @contextlib.contextmanager
    def _turn(self, watch: "_Watch") -> Iterator[None]:
        """Wait for the decodes that came before."""
        while not self._decoding.acquire(timeout=0.1):
            watch.check()
        try:
            self._cancel.clear()
            yield
        finally:
            self._decoding.release()

    def _decode(
        self, job: DecodeRequest, latent: Tensor, checkpoint: Checkpoint, path: Path, place: str, watch: "_Watch"
    ) -> None:
        """Run the job: again with less memory while a rank lacks it, and once on a new group if this one breaks."""
        restarted = False
        tries, usable = 1, 0
        raw = memoryview(latent.numpy()).cast("B")
        while True:
            try:
                self.start()
                ranks = self._take(watch)
                self.decoded = True
                self._run(ranks, watch, "job", raw, job=asdict(job), checkpoint=place_of(path), frames=place)
                self._loaded = ranks, checkpoint.identity, job.dtype
                return
            except GroupError as error:
                if restarted:
                    with self._lock:
                        if self._state is State.RECOVERING:
                            self._fail(str(error))
                    raise
                restarted = True
                watch.tell(f"{_first_line(error)} The rank group is restarted and the decode run again.")
            except _Memory as lack:
                tries += 1
                if tries > MEMORY_TRIES or (lack.least and lack.needed > usable):
                    raise JobError(str(lack)) from None
                if lack.least:  # three quarters are too little, but there is more
                    job = replace(job, memory=lack.needed)
                    continue
                usable = min(lack.free, job.memory or lack.free)
                job = replace(job, memory=min(lack.needed * 3 // 4, lack.free * 9 // 10))
                watch.tell(f"{lack} It is run again in {job.memory / 2**30:.2f} GiB.")

    def _take(self, watch: "_Watch") -> Ranks:
        """The ranks, once they are up, and busy from now on. Raises GroupError where they do not come up, Cancelled."""
        while True:
            with self._lock:
                if self._state is State.READY and not self._ranks.broken:
                    self._move(State.BUSY)
                    return self._ranks
                if self._state is State.STOPPED:
                    raise Cancelled
                if self._state is State.FAILED:
                    raise GroupError(self._error)
                starting = self._starting
            starting.join(0.1)
            self._check(watch)

    def _preload(self, vae: str | Path | Mapping[str, Tensor], shared: Collection[str]) -> None:
        watch = _Watch(cancelled=self._unwanted.is_set)
        try:
            checkpoint, path, _held = self._resolve(vae)
            with self._turn(watch):
                dtype = self.dtype
                if self._loaded != (self._ranks, checkpoint.identity, dtype):
                    ranks = self._take(watch)
                    self._run(ranks, watch, "load", checkpoint=place_of(path), dtype=dtype, shared=list(shared))
                    self._loaded = ranks, checkpoint.identity, dtype
        except (Cancelled, JobError, GroupError, _Memory) as error:
            log.debug("Preloading ended early: %s", error)

    def _run(self, ranks: Ranks, watch: "_Watch", type: str, raw: memoryview | None = None, **fields: object) -> None:
        """Have the ranks do a job. Raises GroupError, JobError, _Memory, Cancelled, or what a callback raised."""
        try:
            self._attend(ranks, watch, type, raw, fields)
        except BaseException:
            with self._lock:
                if self._ranks is ranks and self._state is State.BUSY:
                    self._begin(State.RECOVERING)  # how much of the job they have heard nobody knows
            raise
        self._spare = True

    def _attend(self, ranks: Ranks, watch: "_Watch", type: str, raw: memoryview | None, fields: dict) -> None:
        id = next(self._jobs)
        ranks.begin(id)
        ranks.send(type, raw, id=id, **fields)
        stop, grace = None, None
        told, told_at = 0, time.monotonic()
        answers: list[dict | None] = [None]
        done = total = 0
        while True:
            try:
                with ranks.changed:
                    ranks.changed.wait(0.1)
                    answers = [record.answer for record in ranks.records]
                    done, total = sum(r.done for r in ranks.records), sum(r.total for r in ranks.records)
                if done != told and time.monotonic() - told_at > TELL_SECONDS:
                    told, told_at = done, time.monotonic()
                    self._tell()
                if stop is None:
                    self._check(watch)
                    watch.progress(done, total)
            except (Exception, KeyboardInterrupt) as error:  # the caller's callbacks may raise an interruption
                if stop is None:
                    ranks.send("cancel", id=id)
                stop = error
            if all(answers):
                break
            if self._ranks is not ranks:
                ranks.ended.wait()  # until then they may write to the frames
                raise Cancelled
            if ranks.broken:
                break
            if any(answer and answer["type"] == "failed" for answer in answers):
                grace = grace or time.monotonic() + GRACE_SECONDS
                if time.monotonic() > grace:
                    break
        failed = [record for record in ranks.records if record.answer and record.answer["type"] == "failed"]
        apart = any(record.answer["apart"] for record in failed)
        with self._lock:
            if self._ranks is ranks:
                if ranks.broken or apart or not all(answers):
                    # Some ranks wait for one that has left the decode: they cannot be brought together again.
                    self._begin(State.RECOVERING)
                else:
                    self._move(State.READY)
        if stop:
            raise stop
        if ranks.broken:
            raise GroupError(ranks.broken)
        if failed:
            raise _failure(failed)
        watch.progress(total, total)

    def _check(self, watch: "_Watch") -> None:
        if self._cancel.is_set():
            raise Cancelled
        watch.check()

    def _after(self) -> None:
        if self.keep_loaded == "release":
            self._release()
        elif self.keep_loaded == "stop":
            self.stop()

    def _release(self) -> None:
        with self._lock:
            ranks = self._ranks if self._state is State.READY else None
        if ranks:
            ranks.release(RELEASE_SECONDS)
        self._loaded, self.decoded = None, False
        self._pool.trim()


class _Memory(Exception):
    """Ranks lack memory: `needed` and `free` are bytes. `least`: in no other way would they need less."""

    def __init__(self, words: str, needed: int, free: int, least: bool) -> None:
        super().__init__(words)
        self.needed, self.free, self.least = needed, free, least


def _failure(failed: list[RankRecord]) -> Exception:
    """What to raise for the ranks that failed. Those that were only told to end by another count last."""
    told = [record for record in failed if record.answer["kind"] != "cancelled"]
    if not told:
        return Cancelled()
    lacking = [record for record in told if record.answer["kind"] == "memory"]
    if lacking:
        tightest = min(lacking, key=lambda record: record.answer["free"])
        answer = tightest.answer
        return _Memory(_words(tightest), answer["needed"], answer["free"], answer["least"])
    return JobError(_words(told[0]))


def _words(record: RankRecord) -> str:
    return f"{str(record).capitalize()}: {record.answer['message']}"


def _whole(name: str, value: object) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be a whole number.") from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


class _Watch:
    """The caller's side of a decode in hand."""

    def __init__(
        self,
        progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        notice: Callable[[str], None] | None = None,
        limit: float | None = None,
    ) -> None:
        self.progress = progress or (lambda done, total: None)
        self.cancelled = cancelled or (lambda: False)
        self.notice = notice or (lambda words: None)
        self.limit = limit

    def check(self) -> None:
        """Raise Cancelled or TimeoutError where that is due."""
        if self.cancelled():
            raise Cancelled
        if self.limit is not None and time.monotonic() > self.limit:
            raise TimeoutError("The decode took longer than its timeout; it was cancelled.")

    def tell(self, words: str) -> None:
        log.warning("%s", words)
        self.notice(words)
