"""A rank that cannot connect to the others for a further process group, as if another program had connected instead."""

import torch.distributed as dist

from distributed.ranks import rank
from distributed.worker import TASKS


def fail(*args: object, **options: object) -> None:
    raise RuntimeError("Gloo connectFullMesh failed: Connection refused")


dist.new_group = fail

if __name__ == "__main__":
    rank.main(TASKS)
