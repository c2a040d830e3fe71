"""A real ComfyUI server for the tests that need one, and a check that nothing is left behind."""

import json
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """A running ComfyUI with this pack."""
    from comfyui_host import Host

    host = Host(tmp_path_factory.mktemp("comfyui"))
    try:
        yield host.wait()
    finally:
        host.close()


@pytest.fixture
def prompt():
    """Loads one of `api_prompts` by its name."""

    def load(name: str) -> dict:
        return json.loads((ROOT / "api_prompts" / f"{name}.json").read_text())

    return load


def rank_processes() -> list[psutil.Process]:
    """Processes on this machine that are ranks of ours, or their launchers."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if "distributed.worker" in command or "misbehaving" in command:
            found.append(process)
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind():
    """When all tests are done, no rank may be left, whatever was done to its group."""
    before = {process.pid for process in rank_processes()}
    yield
    limit = time.monotonic() + 15
    while time.monotonic() < limit:
        left = [process for process in rank_processes() if process.pid not in before]
        if not left:
            return
        time.sleep(0.5)
    raise AssertionError(f"processes are left: {left}")
