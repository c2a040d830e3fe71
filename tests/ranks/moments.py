"""Functions that wait for a condition."""

import threading
import time

from distributed import RankGroup


def during(group: RankGroup, act) -> threading.Thread:
    """Call `act` in a thread when the current job has made progress."""

    def wait() -> None:
        limit = time.monotonic() + 60
        while time.monotonic() < limit and not any(
            rank["done"] and rank["state"] == "busy" for rank in group.status()["ranks"]
        ):
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def until(condition, seconds: float) -> bool:
    """Wait for the condition, and return whether it became true within the given seconds."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def pids(group: RankGroup) -> list[int]:
    """Return the process ids of the ranks."""
    return [rank["pid"] for rank in group.status()["ranks"]]
