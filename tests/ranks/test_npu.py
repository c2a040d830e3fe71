"""Ascend devices: decodes with a stand-in for torch_npu (see tests/stand_ins), and the names used of torch_npu."""

import ast
import contextlib
import errno
import os
import socket
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from distributed.ranks import devices
from distributed.ranks import processes as launch

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = ROOT / "tests" / "stand_ins"

DECODE = """
import sys, torch
from benchmarks.random_weights import random_latent
from distributed import RankGroup
if __name__ == "__main__":
    frames = {}
    for devices in ("cpu,cpu", "npu:0-1"):
        with RankGroup(devices, dtype="float32") as group:
            assert [rank["device"] for rank in group.status()["ranks"]] == devices.replace("0-1", "0,npu:1").split(",")
            z = random_latent(2, 32, 3, 4, 5)
            frames[devices] = [group.decode(z, sys.argv[1], mode, tile_size=48, overlap=16).clone()
                               for mode in ("seamless", "tiled")]
            group.release()
            assert torch.equal(group.decode(z, sys.argv[1]), frames[devices][0])
    for ours, theirs in zip(*frames.values()):
        assert torch.equal(ours, theirs)
    try:
        RankGroup("npu:0-2")
    except ValueError as error:
        assert "this machine has npu:0, npu:1" in str(error), error
    else:
        raise AssertionError("npu:2 was accepted")
    print("the same frames")
"""


def test_a_decode_on_npu_devices_gives_the_same_frames_as_on_cpus(vae, tmp_path):
    path = os.pathsep.join([str(STAND_INS), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", DECODE, str(vae)],
        env={**os.environ, "PYTHONPATH": path, "HV15_TEST_NPUS": "2", "HV15_TEST_HCCL": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout == "the same frames\n", done.stderr[-3000:]
    assert {file.name for file in tmp_path.iterdir()} == {"0 of 2", "1 of 2"}  # the ranks joined by hccl


def test_without_npu_devices_torch_npu_is_never_imported(vae):
    code = (
        "import sys; from distributed import RankGroup\n"
        "from benchmarks.random_weights import random_latent\n"
        "if __name__ == '__main__':\n"
        "    with RankGroup('cpu') as group:\n"
        "        group.decode(random_latent(1, 32, 1, 1, 1), sys.argv[1])\n"
        "    assert 'torch_npu' not in sys.modules\n"
    )
    # HV15_TEST_NPUS is not set, so importing the stand-in would fail.
    path = os.pathsep.join([str(STAND_INS), str(ROOT)])
    subprocess.run([sys.executable, "-c", code, str(vae)], env={**os.environ, "PYTHONPATH": path}, check=True)


@pytest.fixture
def sockets():
    """Return a function that registers a socket to be closed when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda holder: stack.enter_context(contextlib.closing(holder))


def base_port(mark: socket.socket) -> int:
    return int(devices.environment("npu", mark)["HCCL_IF_BASE_PORT"])


def test_groups_on_a_host_reserve_different_ports_for_hccl(sockets):
    # With 100 of 235 ranges, a random choice without reservation would select some of them twice.
    ports = {base_port(sockets(devices.reserve_ports("npu"))) for _ in range(100)}
    assert len(ports) == 100
    code = "from distributed.ranks import devices; print(devices.environment('npu', devices.reserve_ports('npu')))"
    for _ in range(3):
        other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert int(ast.literal_eval(other.stdout)["HCCL_IF_BASE_PORT"]) not in ports


def test_ports_for_hccl_on_which_another_program_listens_are_skipped(sockets, monkeypatch):
    first, second = 65100, 65164  # above the ephemeral ports of Linux and the ports of groups of other tests
    monkeypatch.setattr(devices, "HCCL_PORTS", range(first, second + 1, 64))
    sockets(socket.create_server(("127.0.0.1", first + 5)))
    assert base_port(sockets(devices.reserve_ports("npu"))) == second
    with pytest.raises(OSError, match="all 2 port ranges for HCCL are in use"):
        devices.reserve_ports("npu")


def test_a_start_without_free_ports_for_hccl_leaves_no_files_and_no_threads(tmp_path, monkeypatch):
    def none_left(kind: str) -> None:
        raise OSError(errno.EADDRINUSE, "none left")

    monkeypatch.setattr(devices, "reserve_ports", none_left)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = threading.active_count()
    with pytest.raises(OSError, match="none left"):
        launch.RankProcesses(["cpu"], "auto", "distributed.worker", tmp_path / "logs", 10, lambda: None)
    assert not list(tmp_path.iterdir()) and threading.active_count() == before


def used_of_device_modules() -> set[str]:
    """Return the attributes that our code uses of `torch.get_device_module(...)` or of a variable with its result."""

    def is_module(node: ast.expr) -> bool:
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Attribute) and node.func.attr == "get_device_module"
        return getattr(node, "attr", getattr(node, "id", "")) in ("accelerator", "module")

    trees = [ast.parse(path.read_text()) for path in (ROOT / "distributed").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and is_module(node.value)}


@pytest.fixture(scope="module")
def wheel():
    """The published wheel of torch_npu for this torch version. It is downloaded once, read, and never imported."""
    folder = ROOT / ".cache" / "torch_npu"
    version = ".".join(torch.__version__.split(".")[:2])
    if not list(folder.glob(f"torch_npu-{version}*.whl")):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--dest", partial]
            done = subprocess.run([*command, f"torch-npu=={version}.*"], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"torch-npu for torch {version} cannot be downloaded here: {done.stderr[-300:]}")
            for file in Path(partial).iterdir():  # moved when it is complete: another test process may look for it
                file.replace(folder / file.name)
    with zipfile.ZipFile(next(folder.glob(f"torch_npu-{version}*.whl"))) as file:
        yield file


def public_names(wheel: zipfile.ZipFile, module: str) -> set[str]:
    """Return the public names of a module in the wheel: its definitions and imports, including star imports."""
    names: set[str] = set()
    for node in ast.walk(
        ast.parse(wheel.read(f"{module}.py" if f"{module}.py" in wheel.namelist() else f"{module}/__init__.py"))
    ):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names if alias.name != "*"}
            if any(alias.name == "*" for alias in node.names) and node.level:
                names |= public_names(wheel, f"torch_npu/npu/{node.module}".replace(".", "/"))
    return names


def test_every_name_used_of_torch_npu_is_in_the_published_wheel(wheel):
    used = used_of_device_modules()
    assert {"mem_get_info", "set_device", "Stream", "device_count", "empty_cache"} <= used
    assert used <= public_names(wheel, "torch_npu/npu"), used - public_names(wheel, "torch_npu/npu")


def test_the_published_streams_and_events_have_the_methods_that_are_used(wheel):
    tree = ast.parse(wheel.read("torch_npu/npu/streams.py"))
    methods = {
        node.name: {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    assert {"wait_stream", "wait_event", "record_event"} <= methods["Stream"] and "synchronize" in methods["Event"]


def test_the_published_wheel_registers_the_npu_device_and_the_hccl_backend(wheel):
    sources = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".py")]
    assert any('rename_privateuse1_backend("npu")' in source for source in sources)
    assert any("Backend.register_backend(" in source and '"hccl"' in source for source in sources)


def test_the_stand_in_has_only_names_of_the_published_wheel(wheel):
    tree = ast.parse((STAND_INS / "torch_npu" / "__init__.py").read_text())
    offered = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    offered = {name for name in offered if not name.startswith("_")}
    assert offered <= public_names(wheel, "torch_npu/npu")
