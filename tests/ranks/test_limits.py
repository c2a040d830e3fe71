"""Restricted systems: no home, a full disk, a small /tmp, limited container memory, another account."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.ranks.moments import until

ROOT = Path(__file__).resolve().parents[2]
MEMORY = Path("/sys/fs/cgroup/memory")

DECODE = """
import logging, os, sys
logging.basicConfig(format="%(message)s")
from benchmarks.random_weights import random_latent
from distributed import JobError, RankGroup
from distributed.vae.checkpoint import decoder_tensors, open_checkpoint
if __name__ == "__main__":
    weights = {f"decoder.{key}": value for key, value in decoder_tensors(open_checkpoint(sys.argv[1])).items()}
    with RankGroup("cpu,cpu", **dict(argument.split("=") for argument in sys.argv[2:])) as group:
        assert group.decode(random_latent(1, 32, 1, 1, 2), weights).isfinite().all()
        print(os.path.relpath(group._supervisor.ranks.logs, group._supervisor.ranks.folder))
"""


def decode(
    vae: Path,
    *prefix: str,
    code: str = DECODE,
    options: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run a program that decodes. `prefix` is a command that prepares its environment and runs it."""
    variables = {name: value for name, value in os.environ.items() if name != "HOME"} | (environment or {})
    return subprocess.run(
        [*prefix, sys.executable, "-c", code, str(vae), *options],
        env=variables | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def in_namespace(script: str) -> tuple[str, ...]:
    """Return a command prefix for a namespace with the mounts of `script`. Skip the test if mounting is impossible."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("needs to create a mount namespace")
    return "unshare", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh"


def as_nobody() -> tuple[str, ...]:
    """Return a command prefix for an account without an entry and a home. Skip the test if that is impossible."""
    if os.geteuid():
        pytest.skip("needs root to become another account")
    python = Path(sys.base_prefix)
    closed = next((folder for folder in reversed(python.parents) if not folder.stat().st_mode & 0o001), None)
    opened = "true"
    if closed:  # such as root's home: it is replaced by a folder that contains only Python
        opened = f"mount --bind {python} /mnt && mount -t tmpfs -o mode=755 tmpfs {closed} && mkdir -p {python}"
        opened += f" && mount --move /mnt {python}"
    become = (*in_namespace(opened), "setpriv", "--reuid=61234", "--regid=61234", "--clear-groups")
    code = "import os, sys, torch; sys.exit(not os.access(sys.executable, os.X_OK))"
    if subprocess.run([*become, sys.executable, "-c", code], capture_output=True, cwd="/").returncode:
        pytest.skip("another account cannot run this Python")
    return become


def test_an_unknown_account_without_a_home_can_decode(vae):
    become = as_nobody()
    readable = Path(tempfile.mkstemp(suffix=".safetensors", dir="/tmp")[1])
    try:
        readable.write_bytes(vae.read_bytes())
        readable.chmod(0o644)
        ended = decode(readable, *become, environment={"TMPDIR": "/tmp"})
    finally:
        readable.unlink()
    assert ended.stdout == "logs\n", ended.stderr[-3000:]


@pytest.mark.parametrize("home", ["read-only", "full", "/proc"])
def test_logs_are_written_to_the_groups_folder_if_the_home_is_not_writable_with_one_warning(vae, tmp_path, home):
    prefix: tuple[str, ...] = ()
    if home == "full":
        (tmp_path / "home").mkdir()
        home = str(tmp_path / "home")
        prefix = in_namespace(f"mount -t tmpfs -o size=64k tmpfs {home}")
    elif home == "read-only":
        prefix = in_namespace("mount -t tmpfs -o ro tmpfs /mnt")
        home = "/mnt"
    ended = decode(vae, *prefix, environment={"HOME": home})
    assert ended.stdout == "logs\n", ended.stderr[-3000:]
    assert ended.stderr.count("Logs cannot be written to") == 1


def test_weights_and_frames_use_no_space_in_temporary_folders(vae):
    prefix = in_namespace("mount -t tmpfs -o size=128k tmpfs /mnt && mount -t tmpfs -o size=64k tmpfs /dev/shm")
    ended = decode(vae, *prefix, environment={"TMPDIR": "/mnt"})
    assert vae.stat().st_size > 2**18
    assert ended.returncode == 0, ended.stderr[-3000:]


RELATIVE = """
import os, sys
from benchmarks.random_weights import random_latent
from distributed import RankGroup
if __name__ == "__main__":
    os.chdir(os.path.dirname(sys.argv[1]))
    with RankGroup("cpu", logs="logs") as group:
        print(group.decode(random_latent(1, 32, 1, 1, 2), vae=os.path.basename(sys.argv[1])).shape)
        os.chdir("/")
        print(os.path.isfile(group._supervisor.ranks.logs / "rank-0.log"), group._supervisor.ranks.logs.is_absolute())
"""


def test_relative_paths_are_relative_to_the_callers_working_directory(vae):
    ended = decode(vae, code=RELATIVE)
    assert ended.stdout == "torch.Size([1, 1, 16, 32, 3])\nTrue True\n", ended.stderr[-3000:]


FORKING = """
import os, sys
from benchmarks.random_weights import random_latent
from distributed import RankGroup
if __name__ == "__main__":
    with RankGroup("cpu") as group:
        frames = group.decode(random_latent(1, 32, 1, 1, 2), sys.argv[1])
        pids = [rank["pid"] for rank in group.status()["ranks"]]
        if os.fork() == 0:
            sys.exit()  # through the end of the with statement and all exit handlers
        assert os.wait()[1] == 0
        again = group.decode(random_latent(1, 32, 1, 1, 2), sys.argv[1])
        assert [rank["pid"] for rank in group.status()["ranks"]] == pids and (again == frames).all()
        assert group._supervisor.ranks.folder.exists()
    print("the same ranks")
"""


def test_a_forked_child_that_exits_does_not_stop_its_parents_ranks(vae):
    ended = decode(vae, code=FORKING)
    assert ended.stdout == "the same ranks\n", ended.stderr[-3000:]


@pytest.fixture
def container():
    """The folder of a control group that limits memory to 3 GiB."""
    folder = MEMORY / f"hv15-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"needs to create a control group of version 1 that limits memory ({error})")
    try:
        (folder / "memory.limit_in_bytes").write_text(str(3 * 2**30))
        yield folder
    finally:
        assert until(lambda: not (folder / "cgroup.procs").read_text(), 5)
        folder.rmdir()


LARGE = """
import sys, torch
from distributed import JobError, RankGroup
from distributed.ranks.memory import available_memory
if __name__ == "__main__":
    with RankGroup("cpu") as group:
        try:
            group.decode(torch.zeros(1, 32, 60, 80, 80), sys.argv[1])
        except JobError as error:
            print(error)
        assert group.decode(torch.zeros(1, 32, 1, 2, 2), sys.argv[1]).isfinite().all()
        print(available_memory())
"""


def test_frames_larger_than_the_containers_memory_are_refused_before_allocation(vae, container):
    enter = ("sh", "-c", f'echo $$ > {container}/cgroup.procs && exec "$@"', "sh")
    ended = decode(vae, *enter, code=LARGE)
    refusal, available = ended.stdout.splitlines()
    # 237 frames of 1280 x 1280 pixels, three float32 each
    assert re.fullmatch(
        r"Not enough memory for the frames: 4\.34 GiB of memory is needed; [012]\.\d\d GiB is available "
        r"\(the container's limit is 3\.00 GiB\)\. Use a smaller or shorter video\.",
        refusal,
    ), ended.stderr[-3000:]
    assert int(available) < 3 * 2**30


KILLED = """
import contextlib, os, signal, sys, torch
from distributed import GroupError, RankGroup
if __name__ == "__main__":
    with RankGroup("cpu") as group:
        def kill(done, total):
            pid = group.status()["ranks"][0]["pid"]
            if pid and done:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        try:
            group.decode(torch.zeros(1, 32, 96, 6, 6), sys.argv[1], progress=kill)
        except GroupError as error:
            print(str(error).splitlines()[0])
"""


def test_the_error_for_a_killed_rank_names_memory_as_a_possible_reason(vae):
    ended = decode(vae, code=KILLED)
    assert re.fullmatch(
        r"rank 0 \(cpu\), pid \d+, was killed by signal 9 \(SIGKILL\), often because the machine ran out of memory\.\n",
        ended.stdout,
    ), ended.stdout + ended.stderr[-3000:]
