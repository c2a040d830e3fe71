"""The launcher's process: torchrun, with a rendezvous for one host.

torchrun's own rendezvous either listen on all interfaces or keep their state as a pickle. A group's processes are all
on one host, where there is nobody to wait for: the launcher is alone with its store, a file in the group's folder.
Started as `python -m distributed.ranks.torchrun --rdzv-backend=one-host --rdzv-endpoint=FILE ...`; all other options
are torchrun's.
"""

import os

from torch.distributed import FileStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.run import main

BACKEND = "one-host"


class OneHost(RendezvousHandler):
    """The rendezvous of a launcher with itself."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self.file, self.id = parameters.endpoint, parameters.run_id

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        # Ranks meet in a store of their own (`worker`), so the address that torchrun tells them goes unused.
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


if __name__ == "__main__":
    os.environ["HV15_LAUNCHER"] = str(os.getpid())
    rendezvous_handler_registry.register(BACKEND, OneHost)
    main()
