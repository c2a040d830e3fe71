"""Many decodes and many killed processes. `make test` runs short forms, `make soak` the full ones."""

import contextlib
import gc
import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.random_weights import random_latent
from distributed import Cancelled, RankGroup

WHOLE = "HV15_SOAK" in os.environ
KILLS = 50 if WHOLE else 4
DECODES, KILL_EVERY = (300, 50) if WHOLE else (30, 15)
SETTLED = 10
"""Number of decodes after which resource usage must not grow."""
SEED = int(os.environ.get("HV15_SOAK_SEED", random.randrange(2**32)))
NOISE = 48 * 2**20
"""Variation of a process's memory, in bytes, that the allocator causes."""


@pytest.fixture
def chance() -> random.Random:
    print(f"\nseed {SEED}: repeat with HV15_SOAK_SEED={SEED}")
    return random.Random(SEED)


def family(group: RankGroup) -> list[psutil.Process]:
    """Return the launcher and the ranks that are running."""
    ranks = group._supervisor.ranks
    if ranks is None:
        return []
    try:
        launcher = psutil.Process(ranks.launcher.pid)
        return [launcher, *launcher.children(recursive=True)]
    except psutil.Error:
        return []


def test_frames_are_the_same_after_random_kills_at_random_times(vae, chance):
    """A random process receives a signal while the group starts, is idle or decodes."""
    latent = random_latent(1, 32, 24, 6, 6)
    moments = {"start": 0, "idle": 0, "decode": 0}
    seen: list[psutil.Process] = []
    with RankGroup(devices=["cpu", "cpu"]) as group:
        expected = group.decode(latent, vae)
        begun = time.monotonic()
        group.decode(latent, vae)
        length = time.monotonic() - begun
        for _ in range(KILLS):
            moment = chance.choice(sorted(moments))
            moments[moment] += 1
            delay = chance.uniform(0, {"start": 6.0, "idle": 0.5, "decode": length}[moment])

            def kill(delay: float = delay) -> None:
                time.sleep(delay)
                victims = family(group)
                seen.extend(victims)
                if victims:
                    victim = chance.choice(victims)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        victim.send_signal(chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))

            if moment == "start":
                group.stop()
                group.start()
            killer = threading.Thread(target=kill)
            killer.start()
            if moment == "idle":
                killer.join()
            assert torch.equal(group.decode(latent, vae, timeout=150), expected), moment
            killer.join()
            # A kill that was too late for that decode affects this one, so each decode meets at most one.
            assert torch.equal(group.decode(latent, vae, timeout=150), expected), f"after {moment}"
        for process in family(group):
            seen.append(process)
    print(f"kills: {moments}")
    assert not [process for process in seen if process.is_running()]


def test_many_decodes_leak_no_memory_descriptors_threads_or_files(vae, weights, chance, temporary):
    """Sizes, modes and dtypes change, and decodes are cancelled or killed. Usage is compared with early decodes."""
    from safetensors.torch import save_file

    half = vae.with_name("half.safetensors")
    save_file({key: value.half() for key, value in weights.items()}, half)
    sources = [vae, half, weights]
    sizes = [(1, 2, 3), (3, 4, 4), (5, 2, 6), (2, 7, 3), (9, 3, 3)]
    usage: list[dict[str, list[int]]] = []
    with RankGroup(devices=["cpu", "cpu"]) as group:
        for number in range(1, DECODES + 1):
            latent = random_latent(chance.choice([1, 1, 2]), 32, *chance.choice(sizes))
            latent = latent.to(chance.choice([torch.float32, torch.float16, torch.bfloat16]))
            mode = chance.choice(["seamless", "tiled"])
            source = chance.choice(sources)
            killer = None
            if number % KILL_EVERY == 0:
                victim = chance.choice(group.status()["ranks"])["pid"]
                killer = threading.Timer(chance.uniform(0, 0.1), os.kill, (victim, signal.SIGKILL))
                killer.start()
            if number % 7 == 0:
                with pytest.raises(Cancelled):
                    group.decode(latent, source, mode, tile_size=64, overlap=16, cancelled=lambda: True)
            frames = group.decode(latent, source, mode, tile_size=64, overlap=16, timeout=150)
            assert frames.isfinite().all()
            del frames
            if killer:
                killer.join()
                # A late kill hits the idle group, which restarts without a call.
                group.decode(latent, source, timeout=150)
            gc.collect()
            usage.append(measure(group, temporary))
    early, late = usage[SETTLED - 1 : 2 * SETTLED - 1], usage[-SETTLED:]
    for name in ("descriptors", "threads", "files"):
        before, after = (max(sum(moment[name]) for moment in part) for part in (early, late))
        assert after <= before, f"{name}: {before} became {after}"
    for process in range(3):
        before, after = (min(moment["memory"][process] for moment in part) for part in (early, late))
        print(f"memory of process {process}: {before >> 20} MiB after {SETTLED}, {after >> 20} MiB after {DECODES}")
        assert after <= before + NOISE


def measure(group: RankGroup, temporary: Path) -> dict[str, list[int]]:
    """Return the resource usage of the controller and its ranks, in this order."""
    processes = [psutil.Process(), *(psutil.Process(rank["pid"]) for rank in group.status()["ranks"])]
    descriptors = [process.num_fds() for process in processes]
    descriptors[0] -= len(group._buffers._free)  # the pool is bounded, and fills as new sizes come
    return {
        "memory": [process.memory_info().rss for process in processes],
        "descriptors": descriptors,
        "threads": [process.num_threads() for process in processes],
        "files": [len(list(temporary.rglob("*")))],
    }
