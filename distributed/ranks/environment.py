"""Command and environment variables with which the launcher and the ranks are started.

A rank must import the same files as its controller. It uses the same interpreter with the same flags, and the same
search path, entry by entry (see `bootstrap`). Variables of other launchers must not reach it: if ComfyUI runs inside a
Slurm job or another torchrun, torch.distributed.run and the communication libraries would read their variables.
"""

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .bootstrap import VARIABLE

FLAGS = {
    "isolated": "-I",
    "ignore_environment": "-E",
    "no_user_site": "-s",
    "no_site": "-S",
    "safe_path": "-P",
    "dont_write_bytecode": "-B",
    "optimize": "-O",
}
"""Attributes of `sys.flags` that affect imports. Warning filters are omitted: a warning must not end a rank."""

FOREIGN = re.compile(
    "PET_.*|TORCHELASTIC_.*|TORCH_ELASTIC_.*|TORCHRUN_.*|LOGLEVEL|PYTHON_EXEC|USE_LIBUV"
    "|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|NODE_RANK|RANK_TABLE_FILE"
    "|TORCH_(DIST_INIT_BARRIER|DISTRIBUTED_USE_TORCHCOMMS|DISABLE_SHARE_RDZV_TCP_STORE|WORKER_SERVER_SOCKET)"
    "|GLOO_(SOCKET_IFNAME|DEVICE_TRANSPORT.*)|NCCL_(SOCKET_IFNAME|SOCKET_FAMILY|COMM_ID|HOSTID)"
)
"""Variables of other launchers: rendezvous, number of ranks, network interfaces and ports."""


@dataclass(frozen=True)
class RankEnvironment:
    """Parameters of the launcher and the ranks, passed as JSON in one environment variable."""

    folder: Path
    """The group's private folder, with the key of the control connection and the store for the rendezvous."""
    logs: Path
    control: tuple[str, int]
    """The address of the controller's control port."""
    controller: int
    """Process id of the controller."""
    devices: tuple[str, ...]
    """One device per rank."""
    backend: str
    search_path: tuple[str, ...]
    """The controller's `sys.path`, every entry absolute."""
    launcher: int = 0
    """Process id of the launcher. The launcher sets it for the ranks."""
    rank: int = 0
    """This process's rank. torchrun sets it."""

    @property
    def device(self) -> str:
        """The device of this process's rank."""
        return self.devices[self.rank]

    def to_env(self) -> dict[str, str]:
        """Return the environment variables for a process that calls `from_env`."""
        fields = asdict(self) | {"folder": str(self.folder), "logs": str(self.logs)}
        return {VARIABLE: json.dumps(fields)}

    @classmethod
    def from_env(cls) -> "RankEnvironment":
        """Return the parameters of this process. Raises KeyError if it is neither a launcher nor a rank."""
        fields = json.loads(os.environ[VARIABLE])
        paths = {"folder": Path(fields["folder"]), "logs": Path(fields["logs"])}
        lists = {name: tuple(fields[name]) for name in ("control", "devices", "search_path")}
        return replace(cls(**{**fields, **paths, **lists}), rank=int(os.environ.get("RANK", 0)))


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module in a process with the same imports as this process."""
    bootstrap = Path(__file__).with_name("bootstrap.py")
    return [sys.executable, "-u", *interpreter_flags(), str(bootstrap), module, *arguments]


def interpreter_flags() -> list[str]:
    """Return the flags of this interpreter that affect imports, and its -X options."""
    flags = [flag for name, flag in FLAGS.items() for _ in range(int(getattr(sys.flags, name, 0)))]
    return flags + [f"-X{name}" if value is True else f"-X{name}={value}" for name, value in sys._xoptions.items()]


def search_path() -> tuple[str, ...]:
    """Return `sys.path` with absolute entries. Imports ignore non-string entries, so they are omitted."""
    return tuple(_absolute(entry) for entry in sys.path if isinstance(entry, str))


def inherited_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return `variables` without those of other launchers, and with absolute entries in PYTHONPATH."""
    kept = {name: value for name, value in variables.items() if not FOREIGN.fullmatch(name)}
    if kept.get("PYTHONPATH"):
        kept["PYTHONPATH"] = os.pathsep.join(map(_absolute, kept["PYTHONPATH"].split(os.pathsep)))
    return kept


def compiler_cache(variables: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return the variable that sets Triton's cache to `folder` if the user's home is not writable."""
    home = Path(os.path.expanduser("~"))
    if "TRITON_CACHE_DIR" in variables or "TRITON_HOME" in variables or os.access(home, os.W_OK):
        return {}
    return {"TRITON_CACHE_DIR": str(folder / "triton")}


def _absolute(entry: str) -> str:
    try:
        return os.path.abspath(entry)
    except FileNotFoundError:  # relative to a working directory that was removed: invalid in this process, too
        return entry
