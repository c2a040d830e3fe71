"""A rank's process that meets the other ranks later than they expect it, as one that imports slowly does."""

import os
import time

import torch.distributed as dist

from distributed.ranks import rank
from distributed.worker import TASKS

connect = dist.init_process_group
waits = [2.0 * int(os.environ["RANK"])]


def dawdle(*args: object, **options: object) -> None:
    time.sleep(waits.pop() if waits else 0)
    connect(*args, **options)


dist.init_process_group = dawdle

if __name__ == "__main__":
    rank.main(TASKS)
