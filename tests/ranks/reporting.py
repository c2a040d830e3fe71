"""A rank that first writes a report on its interpreter and imports to the file named by HV15_TEST_REPORT."""

import json
import os
import sys

import torch

FLAGS = ("isolated", "ignore_environment", "no_user_site", "no_site", "safe_path", "optimize", "dev_mode", "utf8_mode")


def report() -> dict:
    """Return the flags, options and search path of this process, and the file from which torch is imported."""
    return {
        "flags": {name: int(getattr(sys.flags, name, 0)) for name in FLAGS},
        "options": {name: str(value) for name, value in sys._xoptions.items()},
        "path": [os.path.abspath(entry) for entry in sys.path],
        "torch": torch.__file__,
    }


if __name__ == "__main__":
    from distributed import worker
    from distributed.ranks import rank

    with open(os.environ["HV15_TEST_REPORT"], "w") as file:
        json.dump({**report(), "pack": worker.__file__}, file)
    rank.main(worker.TASKS)
