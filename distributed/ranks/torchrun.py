"""The process of the launcher: torchrun, with a rendezvous for one host.

torchrun's own rendezvous backends either listen on all interfaces or store their state as a pickle. All processes of a
group are on one host, so there is only one launcher, and its store is a file in the group's folder.
Usage: `python bootstrap.py distributed.ranks.torchrun WORKER`, where WORKER is the module that ranks run.
"""

import os
import sys
from dataclasses import replace

from torch.distributed import FileStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.run import parse_args, run

from .environment import RankEnvironment, python_command
from .exits import write_exit

BACKEND = "one-host"


class OneHost(RendezvousHandler):
    """A rendezvous of one launcher."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self.file, self.id = parameters.endpoint, parameters.run_id

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        # Ranks use a store of their own (`peers.connect_world`), so the address that torchrun passes them is unused.
        return RendezvousInfo(FileStore(self.file), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.id

    def shutdown(self) -> bool:
        return True


def main() -> None:
    """Run one worker per device until all have ended or one has failed."""
    environment = replace(RankEnvironment.from_env(), launcher=os.getpid())
    os.environ.update(environment.to_env())
    rendezvous_handler_registry.register(BACKEND, OneHost)
    arguments = ["--nnodes=1", f"--nproc-per-node={len(environment.devices)}", "--max-restarts=0"]
    arguments += [f"--rdzv-backend={BACKEND}", f"--rdzv-endpoint={environment.folder / 'rendezvous'}"]
    arguments += ["--no-python", *python_command(*sys.argv[1:])]
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        write_exit(environment.folder, rank, failure.exitcode)
        raise


if __name__ == "__main__":
    main()
