"""Waiting for the right moment."""

import threading
import time

from distributed import RankGroup


def during(group: RankGroup, act) -> threading.Thread:
    """Call `act` once the job in hand has shown progress."""

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
    """Whether the condition comes true within so many seconds."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def pids(group: RankGroup) -> list[int]:
    """Process ids of the ranks."""
    return [rank["pid"] for rank in group.status()["ranks"]]
