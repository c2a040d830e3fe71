"""What the launcher and the ranks are started with: a command, an environment, and one dataclass inside it.

A rank has to import the same files as its controller: the same interpreter with the same flags, and the same search
path, entry by entry (see `bootstrap`). It must not hear what was set for other launchers: a ComfyUI inside a Slurm job,
or inside another torchrun, has variables that torch.distributed.run and the communication libraries would read.
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
"""Attributes of `sys.flags` that change what is imported. Warning filters are left out: no warning may end a rank."""

FOREIGN = re.compile(
    "PET_.*|TORCHELASTIC_.*|TORCH_ELASTIC_.*|TORCHRUN_.*|LOGLEVEL|PYTHON_EXEC|USE_LIBUV"
    "|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|NODE_RANK|RANK_TABLE_FILE"
    "|TORCH_(DIST_INIT_BARRIER|DISTRIBUTED_USE_TORCHCOMMS|DISABLE_SHARE_RDZV_TCP_STORE|WORKER_SERVER_SOCKET)"
    "|GLOO_(SOCKET_IFNAME|DEVICE_TRANSPORT.*)|NCCL_(SOCKET_IFNAME|SOCKET_FAMILY|COMM_ID|HOSTID)"
)
"""Variables of other launchers: where ranks meet, how many there are, which interfaces and ports they use."""


@dataclass(frozen=True)
class RankEnvironment:
    """What the launcher and the ranks of one start know from the beginning.

    It travels as JSON in one environment variable.
    """

    folder: Path
    """The group's private folder: the key of the control connection, the store in which ranks meet."""
    logs: Path
    control: tuple[str, int]
    """The address of the controller's control port."""
    controller: int
    """Process id of the controller."""
    devices: tuple[str, ...]
    """One for each rank."""
    backend: str
    search_path: tuple[str, ...]
    """The controller's `sys.path`, every entry absolute."""
    launcher: int = 0
    """Process id of the launcher, which sets it for the ranks."""
    rank: int = 0
    """This process's rank. torchrun sets it."""

    @property
    def device(self) -> str:
        """The device of this process's rank."""
        return self.devices[self.rank]

    def to_env(self) -> dict[str, str]:
        """The variables to add to the environment of a process that is to read this with `from_env`."""
        fields = asdict(self) | {"folder": str(self.folder), "logs": str(self.logs)}
        return {VARIABLE: json.dumps(fields)}

    @classmethod
    def from_env(cls) -> "RankEnvironment":
        """What this process was started with. Raises KeyError where it is no launcher and no rank."""
        fields = json.loads(os.environ[VARIABLE])
        paths = {"folder": Path(fields["folder"]), "logs": Path(fields["logs"])}
        lists = {name: tuple(fields[name]) for name in ("control", "devices", "search_path")}
        return replace(cls(**{**fields, **paths, **lists}), rank=int(os.environ.get("RANK", 0)))


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module in a process which imports what this one imports."""
    bootstrap = Path(__file__).with_name("bootstrap.py")
    return [sys.executable, "-u", *interpreter_flags(), str(bootstrap), module, *arguments]


def interpreter_flags() -> list[str]:
    """The flags of this interpreter that change what it imports, and its -X options."""
    flags = [flag for name, flag in FLAGS.items() for _ in range(int(getattr(sys.flags, name, 0)))]
    return flags + [f"-X{name}" if value is True else f"-X{name}={value}" for name, value in sys._xoptions.items()]


def search_path() -> tuple[str, ...]:
    """This process's `sys.path` for a process with another working directory. The import system only reads strings."""
    return tuple(_absolute(entry) for entry in sys.path if isinstance(entry, str))


def inherited_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """`variables` without what was set for other launchers, and with PYTHONPATH's entries made absolute."""
    kept = {name: value for name, value in variables.items() if not FOREIGN.fullmatch(name)}
    if kept.get("PYTHONPATH"):
        kept["PYTHONPATH"] = os.pathsep.join(map(_absolute, kept["PYTHONPATH"].split(os.pathsep)))
    return kept


def compiler_cache(variables: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Where Triton is to keep compiled kernels, if it cannot keep them in the user's home."""
    home = Path(os.path.expanduser("~"))
    if "TRITON_CACHE_DIR" in variables or "TRITON_HOME" in variables or os.access(home, os.W_OK):
        return {}
    return {"TRITON_CACHE_DIR": str(folder / "triton")}


def _absolute(entry: str) -> str:
    try:
        return os.path.abspath(entry)
    except FileNotFoundError:  # relative to a working directory that was removed: it leads nowhere here either
        return entry
