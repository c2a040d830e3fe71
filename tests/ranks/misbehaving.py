"""A rank's process that misbehaves: it does what the file named by HV15_TEST_DEED says, WHAT RANK, while it is there.

late        never comes up
chatter     writes two megabytes to its standard output
refuse      cannot open the checkpoint
raise       raises in the middle of a decode, alone
memory      runs out of memory in the middle of a decode, alone
load        runs out of memory while it loads the weights
hang        never reaches the next collective, but lives and sends its beats
exit        exits in the middle of a decode, with code 7
With "once" behind it the file is taken away before the deed is done.
"""

import os
import time
from pathlib import Path

import torch

from distributed import worker
from distributed.vae import engine
from distributed.vae.engine import Engine

DEED = Path(os.environ["HV15_TEST_DEED"])


def due(*deeds: str) -> str | None:
    """Which of these deeds this rank is to do now."""
    try:
        deed, rank, *once = DEED.read_text().split()
    except OSError:
        return None
    if deed not in deeds or rank != os.environ["RANK"]:
        return None
    if once:
        DEED.unlink()
    return deed


write, open_checkpoint, weights = Engine._write, worker.open_checkpoint, engine.Weights


def misbehave(self: Engine, *args: object) -> None:
    match due("raise", "memory", "hang", "exit", "chatter"):
        case "raise":
            raise RuntimeError("a deed of rank " + os.environ["RANK"])
        case "memory":
            raise torch.OutOfMemoryError("a deed")
        case "hang":
            time.sleep(1000)
        case "exit":
            print("last words of a rank", flush=True)
            os._exit(7)
        case "chatter":
            print("chatter\n" * 2**18, flush=True)
    write(self, *args)


def refuse(path: str) -> object:
    if due("refuse"):
        raise ValueError("a checkpoint that is not to be opened")
    return open_checkpoint(path)


def load(tensors: dict, device: torch.device, dtype: torch.dtype) -> engine.Weights:
    if device.type != "meta" and due("load"):
        raise torch.OutOfMemoryError("a deed")
    return weights(tensors, device, dtype)


Engine._write, worker.open_checkpoint, engine.Weights = misbehave, refuse, load

if __name__ == "__main__":
    if due("late"):
        time.sleep(1000)
    worker.main()
