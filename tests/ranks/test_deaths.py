"""Processes that die or hang are replaced, and the current job is retried. The tests kill real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.random_weights import random_latent
from distributed import Cancelled, GroupError, JobError, RankGroup
from tests.ranks.conftest import ECHO
from tests.ranks.misbehaving import Echo
from tests.ranks.moments import during, kill_within_a_job, pids, until

ROOT = Path(__file__).resolve().parents[2]
X = torch.arange(64.0)
LONG = Echo(X, steps=20, seconds=0.1)


def run(group: RankGroup, job: Echo = LONG, **options) -> None:
    """Run a job and check its result."""
    assert torch.equal(group.run(job, **options)["y"], job.x + 1)


@pytest.mark.parametrize("who", ["rank 0", "rank 1", "launcher"])
def test_a_killed_process_is_replaced_and_the_job_is_retried(echoes, who):
    def kill() -> None:
        pid = echoes._supervisor.ranks.launcher.pid if who == "launcher" else pids(echoes)[int(who[-1])]
        os.kill(pid, signal.SIGKILL)

    before, notices = set(pids(echoes)), []
    killer = during(echoes, kill)
    run(echoes, notice=notices.append)
    killer.join()
    assert echoes.status()["state"] == "ready"
    assert before.isdisjoint(pids(echoes))
    assert not any(psutil.pid_exists(pid) for pid in before)
    assert len(notices) == 1 and "Restarting the rank group and retrying the echo." in notices[0]


def test_the_frames_of_a_decode_are_the_same_after_a_kill(pair, vae):
    latent = random_latent(1, 32, 24, 6, 6)
    expected = pair.decode(latent, vae)
    killer = kill_within_a_job(pair, 0)
    assert torch.equal(pair.decode(latent, vae), expected)
    killer.join()


def test_a_suspended_rank_is_detected_and_replaced(echoes):
    before, notices = set(pids(echoes)), []
    echoes.configure(stall_timeout=60)
    stopper = during(echoes, lambda: os.kill(pids(echoes)[0], signal.SIGSTOP))
    try:
        run(echoes, notice=notices.append)
    finally:
        echoes.configure(stall_timeout=5)
        stopper.join()
    assert "rank 0 (cpu) has not responded for" in notices[0]
    assert before.isdisjoint(pids(echoes))


def test_a_hung_rank_that_sends_heartbeats_is_detected_by_its_lack_of_progress(echoes, once):
    notices = []
    run(echoes, Echo(X, fault="hang", once=once), notice=notices.append)
    assert "made no progress for" in notices[0] and "retrying the echo" in notices[0]


def test_an_error_on_one_rank_fails_the_job_and_the_group_restarts(echoes):
    begun = time.monotonic()
    with pytest.raises(JobError, match=r"Rank 1 \(cpu\): RuntimeError: a fault of rank 1"):
        echoes.run(Echo(X, steps=2, fault="raise"))
    assert time.monotonic() - begun < 10
    run(echoes)


def test_an_error_while_loading_on_one_rank_fails_the_job_and_the_ranks_keep_running(echoes):
    run(echoes, Echo(X))
    before = pids(echoes)
    with pytest.raises(JobError, match=r"Rank 1 \(cpu\): ValueError: a job that is not to be run"):
        echoes.run(Echo(X, fault="refuse"))
    run(echoes, Echo(X))
    assert pids(echoes) == before


def test_a_task_that_returns_before_its_work_is_complete_fails_the_job(echoes):
    with pytest.raises(JobError, match=r"Rank 1 \(cpu\): RuntimeError: The task ended after 1 of 2 steps"):
        echoes.run(Echo(X, fault="short"))


def test_a_rank_that_dies_twice_fails_the_job_with_its_name_exit_code_and_log(echoes):
    with pytest.raises(GroupError) as caught:
        echoes.run(Echo(X, fault="exit"))
    message = str(caught.value)
    assert "rank 1 (cpu)" in message and "exit code 7" in message and "last words of a rank" in message
    log = Path(message.split("Its log, ")[1].split(", ends")[0])
    assert log.is_relative_to(echoes._logs) and "last words" in log.read_text()
    assert echoes.status()["state"] == "failed" and "exit code 7" in echoes.status()["error"]
    run(echoes)


def test_a_process_that_dies_while_idle_is_replaced_without_a_call(echoes):
    run(echoes, Echo(X))
    before = set(pids(echoes))
    os.kill(max(before), signal.SIGKILL)
    assert until(lambda: echoes.status()["state"] == "recovering", 2), "the death was not detected within two seconds"
    assert until(lambda: echoes.status()["state"] == "ready", 60)
    assert before.isdisjoint(pids(echoes))
    run(echoes, Echo(X))


def test_a_release_at_the_moment_when_a_process_dies_raises_nothing(echoes, monkeypatch):
    run(echoes, Echo(X))
    ranks = echoes._supervisor.ranks

    def release() -> None:
        monkeypatch.undo()
        echoes.release()

    monkeypatch.setattr(ranks, "_remember_family", release)  # the ranks have broken; the group does not know it yet
    ranks.give_up("rank 1 was killed", ranks.records[1])
    run(echoes, Echo(X))


def test_a_process_that_dies_before_its_first_job_is_replaced_only_once():
    states = []
    group = RankGroup(["cpu"], worker=ECHO)
    group.on_change = lambda: states.append(group.status()["state"])
    group.start(wait=True)
    os.kill(pids(group)[0], signal.SIGKILL)
    assert until(lambda: "recovering" in states and states[-1] == "ready", 60)
    os.kill(pids(group)[0], signal.SIGKILL)
    assert until(lambda: states[-1] == "failed", 5)
    run(group, Echo(X))
    group.stop()
    changes = [state for state, before in zip(states, [None, *states], strict=False) if state != before]
    expected = ["starting", "ready", "recovering", "ready", "failed", "starting", "ready", "busy", "ready", "stopped"]
    assert changes == expected


@pytest.mark.alone
def test_a_rank_that_computes_for_long_is_not_considered_hung(vae):
    notices, first, begun = [], [], time.monotonic()

    def look(done: int, total: int) -> None:
        if done and not first:
            first.append(time.monotonic() - begun)
            group.cancel()

    with RankGroup(["cpu", "cpu"], stall_timeout=2) as group:
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            group.decode(random_latent(1, 32, 9, 24, 30), vae, progress=look, notice=notices.append)
    assert notices == []
    assert first[0] > 2.5, "the first progress was too early for this test"


@pytest.mark.alone
def test_a_rank_that_waits_for_other_ranks_is_not_considered_hung(vae):
    """There is only one tile, so one of the ranks has none."""
    notices = []
    with RankGroup(["cpu", "cpu"], stall_timeout=2) as group:
        begun = time.monotonic()
        group.decode(random_latent(1, 32, 16, 16, 16), vae, "tiled", notice=notices.append)
    assert notices == []
    assert time.monotonic() - begun > 2.5, "the decode was too short for this test"


@pytest.mark.parametrize("forks", [False, True])
def test_ranks_exit_when_their_controller_is_killed(forks):
    """This also holds if a forked child of the controller keeps its connections open."""
    code = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from distributed import RankGroup\n"
        "if __name__ == '__main__':\n"
        "    group = RankGroup(devices=['cpu', 'cpu']); group.start(wait=True)\n"
        "    child = len(sys.argv) > 2 and os.fork()\n"
        "    if child or len(sys.argv) == 2:\n"
        "        pids = [rank['pid'] for rank in group.status()['ranks']]\n"
        "        print(child, *pids, group._supervisor.ranks.folder, flush=True)\n"
        "    time.sleep(100)\n"
    )
    command = [sys.executable, "-c", code, str(ROOT), *["fork"] * forks]
    controller = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child, *ranks, folder = controller.stdout.readline().split()
    controller.kill()
    controller.wait()
    controller.stdout.close()
    try:
        assert until(lambda: not any(psutil.pid_exists(int(pid)) for pid in ranks), 10)
        assert until(lambda: not Path(folder).exists(), 1)
    finally:
        if forks:
            os.kill(int(child), signal.SIGKILL)


@pytest.mark.parametrize("seconds", [0.0, 0.7, 2.0])
def test_a_controller_that_is_killed_while_ranks_start_leaves_no_process_and_no_folder(seconds):
    """The orphans become children of a subreaper, such as a user's session, which must not be killed."""
    controller = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from distributed import RankGroup\n"
        "group = RankGroup(devices=['cpu', 'cpu']); group.start()\n"
        "while not group._supervisor.ranks: time.sleep(0.01)\n"
        "print(group._supervisor.ranks.folder, flush=True)\n"
        "time.sleep(100)\n"
    )
    session = (
        "import ctypes, os, subprocess, sys, time\n"
        "ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)\n"  # PR_SET_CHILD_SUBREAPER
        "command = [sys.executable, '-c', sys.argv[2], sys.argv[1]]\n"
        "controller = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)\n"
        "folder = controller.stdout.readline().strip()\n"
        "time.sleep(float(sys.argv[3])); controller.kill(); limit = time.monotonic() + 20\n"
        "while time.monotonic() < limit:\n"
        "    try: os.waitpid(-1, os.WNOHANG)\n"
        "    except ChildProcessError: print(folder); break\n"
        "    time.sleep(0.05)\n"
    )
    command = [sys.executable, "-c", session, str(ROOT), controller, str(seconds)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert ended.returncode == 0, "the session was killed"
    assert ended.stdout, "processes are left"
    assert not Path(ended.stdout.strip()).exists()
