"""A rank on gloo that connects to the others with a key file of its own and prints the result.

Arguments: RANK WORLD_SIZE FOLDER KEY. `FOLDER/store` is shared by all ranks; KEY is written to this rank's key file.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from distributed.ranks import peers
from distributed.ranks.devices import Device
from distributed.ranks.environment import RankEnvironment


def main(rank: str, world_size: str, folder: str, key: str) -> None:
    own = Path(folder) / f"rank {rank}"
    own.mkdir()
    (own / "key").write_text(key)
    (own / "store").symlink_to(Path(folder) / "store")
    environment = RankEnvironment(
        folder=own,
        logs=own,
        control=("127.0.0.1", 0),
        controller=os.getppid(),
        devices=("cpu",) * int(world_size),
        backend="auto",
        search_path=(),
    )
    begun = time.monotonic()
    try:
        peers.connect_world(replace(environment, rank=int(rank)), Device(torch.device("cpu")))
    except ConnectionError as error:
        print(f"{time.monotonic() - begun:.1f} ConnectionError: {error}", flush=True)
    else:
        print(f"{time.monotonic() - begun:.1f} connected", flush=True)
        sys.stdin.read()  # until all ranks are connected
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
