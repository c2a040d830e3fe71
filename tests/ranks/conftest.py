"""Groups of real rank processes on gloo, and small checkpoints for them."""

import os
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.random_weights import FULL, TINY, decoder_tensors
from distributed import RankGroup
from tests.leaks import foreign_processes

CPU = torch.device("cpu")
END_SECONDS = 10
"""Time for processes and threads to end after a group was stopped."""
GROUPS: "weakref.WeakSet[RankGroup]" = weakref.WeakSet()
"""Every group that a test of this process has made."""
ECHO = "tests.ranks.misbehaving"


@pytest.fixture(scope="session", autouse=True)
def known_groups() -> Iterator[None]:
    """Keep a list of all groups, for `nothing_is_leaked`."""
    create = RankGroup.__init__

    def remember(group: RankGroup, *args: object, **options: object) -> None:
        create(group, *args, **options)
        GROUPS.add(group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankGroup, "__init__", remember)
        yield


@pytest.fixture(autouse=True)
def nothing_is_leaked(known_groups) -> Iterator[None]:
    """Fail the test that leaves a group running, or a process or thread that belongs to no running group.

    Groups of wider fixtures, which exist before the test begins, may keep theirs.
    """
    before = running_groups()
    yield
    limit = time.monotonic() + END_SECONDS
    while left := leaked(before):
        assert time.monotonic() < limit, f"The test leaves behind: {', '.join(left)}"
        time.sleep(0.1)


@pytest.fixture
def leaks(nothing_is_leaked):
    """What would be reported now as left behind by this test."""
    before = running_groups()
    return lambda: leaked(before)


def running_groups() -> set[RankGroup]:
    return {group for group in GROUPS if group.status()["state"] != "stopped"}


def leaked(before: set[RankGroup]) -> list[str]:
    """What a test has left behind, by name."""
    running = running_groups()
    left = [f"group {group.id} on {','.join(group.devices)}" for group in running - before]
    if any(group.status()["state"] == "failed" for group in running):
        return left  # its processes are ending
    left += foreign_processes(running)
    if not running:
        names = {thread.name for thread in threading.enumerate() if thread.name.startswith("hv15-")}
        left += [f"thread {name}" for name in names - {"hv15-offers"}]  # that one lives as long as a buffer is held
        left += [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("hv15-")]
    return left


@pytest.fixture(scope="session", autouse=True)
def temporary(tmp_path_factory):
    """A temporary folder of these tests' own, which must hold nothing of ours at their end."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        yield folder
    limit = time.monotonic() + END_SECONDS  # the ranks of a ComfyUI that has just ended delete their folder
    while left := list(folder.glob("hv15-*")):
        assert time.monotonic() < limit, f"The tests leave behind: {left}"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def weights() -> dict:
    """A small decoder's state dict, as a VAE would give it."""
    return {f"decoder.{name}": tensor for name, tensor in decoder_tensors(TINY, CPU).items()}


@pytest.fixture(scope="session")
def vae(weights, tmp_path_factory) -> Path:
    """The same on disk."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="session")
def full(tmp_path_factory) -> Path:
    """A checkpoint of the real size, for tests on GPUs."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("full") / "vae.safetensors"
    tensors = decoder_tensors(FULL, torch.device("cuda"))
    save_file({f"decoder.{key}": value.bfloat16().cpu() for key, value in tensors.items()}, path)
    del tensors
    torch.cuda.empty_cache()
    return path


@pytest.fixture(scope="module")
def pair(vae):
    """Two ranks, warm, for all tests of a module."""
    with RankGroup(devices=["cpu", "cpu"]) as group:
        yield group


@pytest.fixture(scope="module")
def echoes(tmp_path_factory):
    """Two ranks that run `Echo` jobs, and misbehave when told to, for all tests of a module."""
    logs = tmp_path_factory.mktemp("logs")
    with RankGroup(["cpu", "cpu"], worker=ECHO, logs=logs, stall_timeout=5) as group:
        yield group


@pytest.fixture
def once(tmp_path) -> Path:
    """A file for faults that are done once."""
    path = tmp_path / "once"
    path.touch()
    return path
