"""A rank that connects to the other ranks with a delay, as if its imports were slow."""

import os
import time

import torch.distributed as dist

from distributed.ranks import rank
from distributed.worker import TASKS

connect = dist.init_process_group
waits = [2.0 * int(os.environ["RANK"])]


def connect_late(*args: object, **options: object) -> None:
    time.sleep(waits.pop() if waits else 0)
    connect(*args, **options)


dist.init_process_group = connect_late

if __name__ == "__main__":
    rank.main(TASKS)
