"""A handle to a persistent group of ranks, with one process per device.

    with RankGroup(devices=["cuda:0", "cuda:1"]) as group:
        frames = group.decode(latent, vae="path/to/vae", mode="seamless")

The group starts in the background and keeps its processes and weights between jobs. Processes that die or hang are
replaced at once, and the current job is retried on the new ones. Invalid input is refused before anything is sent to
the ranks. All methods are thread-safe; jobs are queued.
"""

import contextlib
import itertools
import logging
import math
import numbers
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from .denoise.denoiser import Denoiser
from .denoise.weights import open_transformer
from .errors import Cancelled, GroupError, JobError, NoRoom, NotLoaded
from .jobs import Job, Load, TensorSpec
from .ranks import devices as device_module
from .ranks import protocol
from .ranks.buffers import SharedBuffers, SharedTensor
from .ranks.exchange import POLL_SECONDS, Caller, MemoryShortage, exchange
from .ranks.logs import default_folder
from .ranks.processes import RankProcesses
from .ranks.states import RankState, State
from .ranks.status import RankStatus
from .ranks.supervisor import Supervisor
from .vae.job import DTYPES, DecodeJob, WeightSource

log = logging.getLogger(__name__)

KEEP = ("keep", "release", "stop")
RELEASE_SECONDS = 15
MEMORY_TRIES = 4


class RankGroup:
    """A persistent group of ranks. See the module's docstring.

    devices: "auto", "cuda:0,cuda:1", "npu:0-3", "cpu,cpu", or a list. backend: "auto", or a backend of
    torch.distributed. options: see `configure`. on_change: called, in any thread, when the group's status changes; it
    must not wait for another thread that uses the group. logs: folder for the ranks' logs, by default in the user's
    cache. worker: name of the module that ranks run.

    Raises ValueError for invalid devices or options.
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
        self._supervisor = Supervisor(self._launch, lambda: self.start_timeout, lambda: self.on_change())
        self._turns = threading.Lock()
        """Held by the call whose job is running."""
        self._callers: set[Caller] = set()
        """The calls that are queued or running."""
        self._job_in_hand: str | None = None
        self._step: tuple[int, int] | None = None
        self._numbers = itertools.count(1)
        self._buffers = SharedBuffers()
        self._weights: WeightSource | None = None
        """The last weights that were passed in memory."""
        self._yield_memory = threading.Event()
        """Set while `release` or `finish` is waiting: it ends preloading."""
        self.decoded = False
        """Whether a job may have left data on the devices. If not, the ranks hold preloaded weights or nothing."""

    def __enter__(self) -> "RankGroup":
        try:
            self.start(wait=True)
        except BaseException:
            self.stop()
            raise
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
        """Set the options that can change while the group is running. The current job keeps its dtype.

        dtype: data type of the computation; "auto" selects it by device. keep_loaded: action after a decode, and of
        `finish`: "keep" weights on the devices, "release" them, or "stop" the processes. start_timeout: time limit, in
        seconds, for starting the ranks. stall_timeout: seconds without progress after which a rank is considered hung.

        Raises ValueError for invalid options, and then changes nothing.
        """
        if dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype is {dtype!r}; it must be auto or one of {', '.join(DTYPES)}.")
        if keep_loaded not in KEEP:
            raise ValueError(f"keep_loaded is {keep_loaded!r}; it must be one of {', '.join(KEEP)}.")
        check_seconds("start_timeout", start_timeout)
        check_seconds("stall_timeout", stall_timeout)
        self.dtype = device_module.automatic_dtype(self.devices) if dtype == "auto" else dtype
        self.keep_loaded = keep_loaded
        self.start_timeout, self.stall_timeout = start_timeout, stall_timeout

    def start(self, wait: bool = False) -> None:
        """Start the ranks in the background, unless they are running. With `wait`, return when they are ready.

        With `wait`, raises GroupError if they do not start.
        """
        self._supervisor.start()
        if wait:
            self._supervisor.wait_started()

    def preload(self, vae: str | Path | Mapping[str, Tensor], shared: Collection[str] = ()) -> None:
        """Start the ranks and load this checkpoint, in the background, before the next decode.

        For the devices in `shared` it is only read into host memory, because other work uses their memory until the
        decode starts. Errors are reported by the next decode.
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

        vae: path of a checkpoint (either layout, file or diffusers folder) or a state dict. tile_size and overlap, in
        pixels, apply to "tiled" mode. memory: memory limit per rank in bytes. frames_started: called with the frames
        before they are filled. See `run` for the other arguments and the errors.
        """
        try:
            job = DecodeJob.make(
                latent,
                self._find_weights(vae),
                mode,
                tile_size=tile_size,
                overlap=overlap,
                memory=memory,
                world_size=len(self.devices),
            )
        except (ValueError, OSError, MemoryError) as error:
            raise JobError(str(error)) from error
        started = frames_started and (lambda outputs: frames_started(outputs["frames"]))
        outputs = self.run(job, progress=progress, timeout=timeout, cancelled=cancelled, started=started, notice=notice)
        return outputs["frames"]

    def denoiser(self, path: str | Path) -> Denoiser:
        """Return the transformer at `path` as a function on the ranks: velocity = model(latents, timestep, conditions).

        path: a diffusers folder, or a file of either layout. See `Denoiser`. Call `finish` after the last step. Raises
        JobError if the path is not a HunyuanVideo-1.5 transformer.
        """
        try:
            return Denoiser(open_transformer(path), self.run)
        except (ValueError, OSError) as error:
            raise JobError(str(error)) from error

    def run(
        self,
        job: Job,
        *,
        progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        started: Callable[[dict[str, Tensor]], None] | None = None,
        notice: Callable[[str], None] | None = None,
        timeout: float | None = None,
        step: tuple[int, int] | None = None,
        make_room: Callable[[], None] | None = None,
    ) -> dict[str, Tensor]:
        """Run a job on the ranks, after the jobs queued before it, and return its outputs.

        progress(done, total) and cancelled() are called on this thread, several times a second. started: called with
        the outputs before they are filled. notice: called with a sentence for the user when the job is retried.
        timeout: time limit of the whole call in seconds. step: for the status, the number of this job in a series, from
        1, and the number of jobs in the series. make_room: frees memory on the ranks' devices that other work uses. It
        is called on this thread, at most once, if the free memory is not enough to run the job at full speed.

        Raises JobError if the job fails or memory is insufficient, GroupError if the group broke twice, Cancelled
        after `cancel` and `stop`, TimeoutError, and ValueError for an invalid timeout.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)
        limit = None if timeout is None else time.monotonic() + timeout
        with self._turn(Caller(job.noun, progress, cancelled, notice, limit, step, make_room)) as caller:
            inputs, _held = self._share(job.inputs)
            outputs, filled = self._lend(job.outputs)
            if started:
                started(filled)
            try:
                self._run_with_retries(job, inputs, outputs, caller)
            finally:
                if job.last:
                    self._after()
            return filled

    def finish(self) -> None:
        """Apply `keep_loaded` after a series of jobs, such as the steps of a sampler.

        Unless it is "keep", this waits for the current job and ends preloading.
        """
        if self.keep_loaded != "keep":
            with self._turn_after_preload():
                self._after()

    def cancel(self) -> None:
        """Cancel the current job and all queued jobs: they raise Cancelled within a step. The ranks keep running."""
        for caller in list(self._callers):
            caller.stopped = True

    def release(self) -> None:
        """Free device memory and unused buffers. The processes keep running.

        Waits for the current job, so its callbacks must not call this method. Ends preloading.
        """
        with self._turn_after_preload():
            self._release()

    def stop(self) -> None:
        """Stop the processes. All jobs raise Cancelled. The next call that needs the processes starts them again."""
        with self._supervisor.lock:
            self.cancel()
            self._weights, self.decoded = None, False
        self._supervisor.stop()
        self._buffers.trim()

    def status(self) -> dict:
        """Return the group's entry in `GET /hv15/groups`: id, state, error, dtype, kind and step of the job, and ranks.

        Each rank has the keys rank, pid, device, state, done and total.
        """
        with self._supervisor.lock:
            state, ranks = self._supervisor.state, self._supervisor.ranks
            absent = RankState.STARTING if state in (State.STARTING, State.RECOVERING) else RankState.STOPPED
            records = [RankStatus(rank, device, state=absent) for rank, device in enumerate(self.devices)]
            return {
                "id": self.id,
                "state": state.value,
                "error": self._supervisor.error,
                "dtype": self.dtype,
                "job": self._job_in_hand if state is State.BUSY else None,
                "step": list(self._step) if state is State.BUSY and self._step else None,
                "ranks": [
                    {
                        "rank": record.rank,
                        "pid": record.pid,
                        "device": record.device,
                        "state": record.state.value,
                        "done": record.done,
                        "total": record.total,
                    }
                    for record in (ranks.records if ranks else records)
                ],
            }

    def _launch(self, on_change: Callable[[], None]) -> RankProcesses:
        return RankProcesses(
            self.devices, self.backend, self._worker, self._logs, lambda: self.stall_timeout, on_change
        )

    def _find_weights(self, vae: str | Path | Mapping[str, Tensor]) -> WeightSource:
        """Check the VAE and return its weights. A state dict is copied to shared memory and kept for the next call.

        Raises ValueError, OSError, MemoryError.
        """
        with self._supervisor.lock:
            before = self._weights
        source = WeightSource.find(vae, before)
        if source.shared:
            with self._supervisor.lock:
                self._weights = source
        return source

    @contextlib.contextmanager
    def _turn(self, caller: Caller) -> Iterator[Caller]:
        """Wait for the jobs queued before this one. Raises what `Caller.check` raises."""
        self._callers.add(caller)
        try:
            while not self._turns.acquire(timeout=POLL_SECONDS):
                caller.check()
            try:
                yield caller
            finally:
                self._turns.release()
        finally:
            self._callers.discard(caller)

    @contextlib.contextmanager
    def _turn_after_preload(self) -> Iterator[None]:
        """Wait for the current job. A preload ends early."""
        self._yield_memory.set()
        with self._turns:
            self._yield_memory.clear()
            yield

    def _share(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, SharedTensor], dict[str, Tensor]]:
        """Copy inputs to shared memory, which stays allocated as long as the returned tensors exist."""
        places, copies = self._lend({name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()})
        for name, tensor in tensors.items():
            copies[name].copy_(tensor)
        return places, copies

    def _lend(self, specs: Mapping[str, TensorSpec]) -> tuple[dict[str, SharedTensor], dict[str, Tensor]]:
        places, tensors = {}, {}
        for name, (shape, dtype) in specs.items():
            size = math.prod(shape) * dtype.itemsize / 2**30
            try:
                tensors[name], places[name] = self._buffers.allocate(shape, dtype)
            except OSError as error:
                raise JobError(
                    f"Could not allocate {size:.2f} GiB of shared memory for the {name}: {error}."
                ) from error
            except MemoryError as error:
                raise JobError(f"Not enough memory for the {name}: {error} Use a smaller or shorter video.") from error
        return places, tensors

    def _run_with_retries(
        self, job: Job, inputs: dict[str, SharedTensor], outputs: dict[str, SharedTensor], caller: Caller
    ) -> None:
        """Run the job. Retry it once if the group breaks, and if memory is short, first with room, then with less."""
        dtype = self.dtype
        restarted = loaded = False
        tries, usable = 1, 0
        loads: list[Load] = []
        while True:
            try:
                self._supervisor.start(caller.check_stopped)
                self.decoded = True
                while loads:
                    self._load(loads[0], dtype, caller)
                    del loads[0]
                fields = {**job.fields, "dtype": dtype}
                may_decline = caller.make_room is not None
                message = protocol.Run(next(self._numbers), job.kind, fields, inputs, outputs, may_decline)
                self._send(message, RankState.BUSY, caller)
                return
            except GroupError as error:
                if restarted:
                    self._supervisor.give_up(str(error))
                    raise
                restarted, loaded = True, False
                caller.report(f"{_first_line(error)} Restarting the rank group and retrying the {job.noun}.")
            except NotLoaded as error:
                if loaded:
                    raise JobError(str(error)) from None
                loaded, loads = True, list(job.loads)
            except NoRoom:
                caller.request_room()
            except MemoryShortage as shortage:
                if caller.request_room():
                    continue
                tries += 1
                if tries > MEMORY_TRIES or (shortage.smallest_plan and shortage.needed > usable):
                    raise JobError(str(shortage)) from None
                if shortage.smallest_plan:  # three quarters were too little, but more is available
                    job = job.limited(shortage.needed)
                    continue
                usable = min(shortage.free, job.memory or shortage.free)
                job = job.limited(min(shortage.needed * 3 // 4, shortage.free * 9 // 10))
                caller.report(f"{shortage} Retrying with a limit of {job.memory / 2**30:.2f} GiB.")

    def _load(self, load: Load, dtype: str, caller: Caller) -> None:
        """Load something on all ranks. Raises what `_send` raises."""
        inputs, _held = self._share(load.inputs)
        fields = {**load.fields, "dtype": dtype}
        message = protocol.Load(next(self._numbers), load.kind, fields, inputs)
        self._send(message, RankState.LOADING, caller)

    def _send(self, message: protocol.Load | protocol.Run, state: RankState, caller: Caller) -> None:
        """Send a job to the ranks and wait for its end. Raises what `exchange` raises."""
        self._job_in_hand, self._step = message.kind, caller.step
        exchange(self._supervisor, message, state, caller)

    def _preload(self, vae: str | Path | Mapping[str, Tensor], shared: Collection[str]) -> None:
        try:
            source = self._find_weights(vae)
            with self._turn(Caller("preload", cancelled=self._yield_memory.is_set)) as caller:
                self._load(source.load(shared), self.dtype, caller)
        except (ValueError, OSError, MemoryError, Cancelled, JobError, GroupError, MemoryShortage, NotLoaded) as error:
            log.debug("Preloading ended early: %s", error)

    def _after(self) -> None:
        if self.keep_loaded == "release":
            self._release()
        elif self.keep_loaded == "stop":
            self.stop()

    def _release(self) -> None:
        with self._supervisor.lock:
            ranks = self._supervisor.ranks if self._supervisor.state is State.READY else None
        if ranks:
            ranks.release(RELEASE_SECONDS)
        self.decoded = False
        self._buffers.trim()


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def check_seconds(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a positive, finite number of seconds."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a positive number of seconds.")
