"""Ranks import the same files as their controller, and receive no variables of other launchers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.random_weights import random_latent
from distributed import RankGroup

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = Path(pytest.__file__).resolve().parents[1]
"""site-packages of the environment that these tests run in."""
PYTHON = sys._base_executable
"""The interpreter outside the virtual environment, which can have user packages."""

CONTROLLER = """
import importlib.util, json, os, sys
pack, *paths = sys.argv[1:]
sys.path[:0] = paths  # as a program or a wrapper would
spec = importlib.util.spec_from_file_location("under_another_name", f"{pack}/distributed/__init__.py")
package = sys.modules["under_another_name"] = importlib.util.module_from_spec(spec)  # as ComfyUI does
spec.loader.exec_module(package)
from reporting import report
if __name__ == "__main__":
    with package.RankGroup("cpu", worker="reporting") as group:
        print(json.dumps(report()))
"""


def report_of_a_rank(tmp_path: Path, *flags: str, pack: Path = ROOT, **variables: str) -> dict:
    """Return a rank's report. Fail if it differs from the controller's report or the rank imports another pack."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ended = subprocess.run(
        [PYTHON, *flags, "-c", CONTROLLER, pack, ROOT / "tests" / "ranks", PACKAGES],
        env={**kept, "PYTHONUSERBASE": str(tmp_path), "HV15_TEST_REPORT": str(tmp_path / "report"), **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    rank = json.loads((tmp_path / "report").read_text())
    assert rank.pop("pack") == str(pack / "distributed" / "worker.py")
    assert rank == json.loads(ended.stdout)
    return rank


def user_packages(tmp_path: Path) -> Path:
    """Create and return the folder of a user's own packages under PYTHONUSERBASE."""
    folder = tmp_path / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["-s"], id="no user packages"),
        pytest.param(["-I"], id="isolated"),
        pytest.param(["-E", "-O"], id="no PYTHON variables, optimised"),
        pytest.param(["-S"], id="no site"),
        pytest.param(["-P", "-X", "utf8=0", "-X", "dev"], id="safe path, options"),
    ],
)
def test_ranks_have_the_controllers_flags_and_search_path(tmp_path, flags):
    if "-P" in flags and sys.version_info < (3, 11):
        pytest.skip("-P is new in Python 3.11")
    rank = report_of_a_rank(tmp_path, *flags)
    assert rank["flags"]["isolated"] == ("-I" in flags) and rank["flags"]["no_site"] == ("-S" in flags)


def test_ranks_do_not_import_a_users_torch_that_the_controller_does_not_see(tmp_path):
    (user_packages(tmp_path) / "torch.py").write_text("raise RuntimeError('the torch of the user')")
    assert Path(report_of_a_rank(tmp_path, "-s")["torch"]).is_relative_to(PACKAGES)


@pytest.mark.parametrize("then", ["", "; import distributed"])
def test_ranks_import_this_packs_package_if_a_pth_file_puts_another_one_first(tmp_path, then):
    packages, other = user_packages(tmp_path), tmp_path / "other"
    (other / "distributed").mkdir(parents=True)
    (other / "distributed" / "__init__.py").write_text("")
    (packages / "other.pth").write_text(f"import sys; sys.path.insert(0, {str(other)!r}){then}\n")
    assert str(other) in report_of_a_rank(tmp_path)["path"]


def test_ranks_resolve_a_relative_python_path_against_the_controllers_folder(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "sitecustomize.py").write_text("import sys; sys.path.append('/customised')")
    rank = report_of_a_rank(tmp_path, PYTHONPATH="here")
    assert {str(tmp_path / "here"), "/customised"} <= set(rank["path"])


def test_the_packs_path_may_contain_a_colon(tmp_path):
    pack = tmp_path / "pa:ck"
    shutil.copytree(ROOT / "distributed", pack / "distributed", ignore=shutil.ignore_patterns("__pycache__"))
    report_of_a_rank(tmp_path, pack=pack)


def test_settings_for_other_launchers_reach_no_rank_and_open_no_port(vae, tmp_path, monkeypatch):
    settings = {
        "LOGLEVEL": "debug",
        "PYTHON_EXEC": "/bin/false",
        "PET_NNODES": "2",
        "PET_STANDALONE": "1",
        "PET_VIRTUAL_LOCAL_RANK": "1",
        "PET_RUN_PATH": "1",
        "TORCHELASTIC_HEALTH_CHECK_PORT": "0",
        "TORCHELASTIC_ERROR_FILE": str(tmp_path / "none" / "error"),
        "MASTER_ADDR": "192.0.2.1",
        "MASTER_PORT": "1",
        "RANK": "5",
        "WORLD_SIZE": "9",
        "LOCAL_RANK": "3",
        "GLOO_SOCKET_IFNAME": "",
        "GLOO_DEVICE_TRANSPORT": "TCP_TLS",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with RankGroup("cpu,cpu", start_timeout=60) as group:
        assert group.decode(random_latent(1, 32, 1, 1, 2), vae).isfinite().all()
        processes = [psutil.Process(group._supervisor.ranks.launcher.pid)]
        processes += [psutil.Process(rank["pid"]) for rank in group.status()["ranks"]]
        for process in processes:
            assert {c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"} <= {"127.0.0.1"}


def test_ranks_sum_in_an_order_that_does_not_depend_on_the_alignment_of_memory(monkeypatch):
    monkeypatch.delenv("MKL_CBWR")
    with RankGroup("cpu") as group:
        group.start(wait=True)
        (rank,) = group.status()["ranks"]
        assert psutil.Process(rank["pid"]).environ()["MKL_CBWR"] == "AUTO"
