"""Functions that wait for a condition."""

import threading
import time

import psutil

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


def kill_within_a_job(group: RankGroup, rank: int) -> threading.Thread:
    """Kill a rank in a thread while it computes, however short the group's jobs are.

    A suspended rank holds up the job that it is in, or the next one, which then lasts until the rank is killed.
    """

    def kill() -> None:
        assert until(lambda: group.status()["state"] == "busy", 60)
        process = psutil.Process(pids(group)[rank])
        process.suspend()
        time.sleep(1)
        process.kill()

    thread = threading.Thread(target=kill)
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
