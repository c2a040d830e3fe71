"""The environment of ranks: which variables are passed on, and which are not."""

import os
import re
from pathlib import Path

import pytest

from distributed.ranks import environment
from distributed.ranks.bootstrap import VARIABLE
from distributed.ranks.environment import RankEnvironment, compiler_cache, inherited_environment, search_path
from distributed.ranks.exits import describe_exit, read_exit, write_exit

START = RankEnvironment(
    folder=Path("/a folder"),
    logs=Path("/logs: with a colon"),
    control=("127.0.0.1", 4711),
    controller=17,
    devices=("cuda:1", "cuda:0"),
    backend="nccl",
    search_path=("/one", "/two:three"),
    launcher=18,
)


def test_the_rank_environment_survives_the_round_trip(monkeypatch):
    for name, value in START.to_env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    found = RankEnvironment.from_env()
    assert found.rank == 1 and found.device == "cuda:0"
    assert {**vars(found), "rank": 0} == vars(START)


def test_a_process_that_is_not_a_rank_has_no_rank_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(KeyError):
        RankEnvironment.from_env()


def test_variables_that_select_devices_are_inherited_unchanged():
    selection = {
        "CUDA_VISIBLE_DEVICES": "GPU-8f5e1d8c-0000-0000-0000-000000000000,1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "ASCEND_RT_VISIBLE_DEVICES": "3,1",
        "NCCL_P2P_DISABLE": "1",
        "LD_LIBRARY_PATH": "/usr/lib",
    }
    assert inherited_environment(selection) == selection


OTHERS = """PET_NNODES TORCHELASTIC_RUN_ID LOGLEVEL PYTHON_EXEC MASTER_ADDR RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE
GROUP_RANK ROLE_NAME GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME NCCL_COMM_ID"""


@pytest.mark.parametrize("name", OTHERS.split())
def test_variables_of_other_launchers_are_not_inherited(name):
    assert inherited_environment({name: "x", f"MY_{name}": "y", "HOME": "/"}) == {f"MY_{name}": "y", "HOME": "/"}


def test_the_variables_that_torchrun_reads_are_not_passed_on_or_harmless():
    """Every variable that torch.distributed.run and its modules read is either not passed on or harmless."""
    import torch.distributed.launcher.api
    import torch.distributed.run
    from torch.distributed import argparse_util
    from torch.distributed.elastic.agent.server import local_elastic_agent
    from torch.distributed.elastic.multiprocessing.errors import error_handler
    from torch.distributed.elastic.utils import logging

    modules = [torch.distributed.run, torch.distributed.launcher.api, argparse_util, local_elastic_agent]
    read = set()
    for module in [*modules, error_handler, logging]:
        text = Path(module.__file__).read_text()
        read |= set(re.findall(r"os\.(?:environ\.get\(|getenv\(|environ\[)\s*\"(\w+)\"", text))
    assert {"PYTHON_EXEC", "LOGLEVEL", "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"} <= read
    inherited = {name for name in read if not environment.FOREIGN.fullmatch(name)}
    assert inherited <= {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH_NCCL_ASYNC_ERROR_HANDLING"}


def test_search_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", "lib", "/usr/lib", Path("not a string")])
    assert search_path() == (str(tmp_path), str(tmp_path / "lib"), "/usr/lib")
    assert inherited_environment({"PYTHONPATH": f"lib{os.pathsep}/usr"}) == {
        "PYTHONPATH": f"{tmp_path / 'lib'}{os.pathsep}/usr"
    }


def test_compiled_kernels_are_cached_in_the_groups_folder_without_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiler_cache({}, Path("/group")) == {}
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    assert compiler_cache({}, Path("/group")) == {"TRITON_CACHE_DIR": str(Path("/group/triton"))}
    assert compiler_cache({"TRITON_CACHE_DIR": "/mine"}, Path("/group")) == {}


def test_the_name_of_the_rank_variable_appears_in_one_file():
    root = Path(environment.__file__).resolve().parents[2]
    sources = [path for folder in ("distributed", "nodes") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 30
    assert [path.name for path in sources if '"HV15_RANK"' in path.read_text()] == ["bootstrap.py"]
    assert not [path for path in sources if 'environ["HV15' in path.read_text()]


def test_only_the_rank_that_ended_first_has_an_exit_code(tmp_path):
    assert read_exit(tmp_path, 1) is None
    write_exit(tmp_path, 1, -9)
    assert read_exit(tmp_path, 1) == -9 and read_exit(tmp_path, 0) is None


def test_an_exit_code_is_described_as_a_code_or_a_signal():
    assert describe_exit(7) == "ended with exit code 7"
    assert describe_exit(-9) == "was killed by signal 9 (SIGKILL), often because the machine ran out of memory"
    assert describe_exit(-11) == "was killed by signal 11 (SIGSEGV)"
    assert describe_exit(-63) == "was killed by signal 63"
