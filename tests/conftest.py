"""A real ComfyUI server for the tests that need one, and a check that nothing is left behind."""

import json
import os
import sys
import time
import uuid
from pathlib import Path

import hypothesis
import psutil
import pytest
import torch

os.environ.setdefault("MKL_CBWR", "AUTO")  # as in ranks; MKL reads it at its first call

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when Triton is first imported: its interpreter then runs the kernels with NumPy
    )

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

hypothesis.settings.register_profile("behaviour, not times", deadline=None)
hypothesis.settings.load_profile("behaviour, not times")

RUN = uuid.uuid4().hex
"""Set in the environment of all processes that these tests start, to tell them from other processes."""
os.environ["HV15_TEST_RUN"] = RUN


def pytest_collection_modifyitems(items) -> None:
    """Skip tests that need a GPU if there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


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
    """A function that loads one of `api_prompts` by its name."""

    def load(name: str) -> dict:
        return json.loads((ROOT / "api_prompts" / f"{name}.json").read_text())

    return load


def rank_processes() -> list[psutil.Process]:
    """Return the ranks and launchers that these tests started, directly or indirectly."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if "distributed.worker" in command or "misbehaving" in command:
            try:
                if process.environ().get("HV15_TEST_RUN") == RUN:
                    found.append(process)
            except psutil.Error:
                continue  # it has ended, or belongs to another account
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind():
    """Assert after all tests that no rank is left."""
    yield
    limit = time.monotonic() + 15
    while left := rank_processes():
        assert time.monotonic() < limit, f"processes are left: {left}"
        time.sleep(0.5)
