"""Jobs that are queued, cancelled, retried or need other data, and the start, stop and status of a group."""

import gc
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.random_weights import random_latent
from distributed import Cancelled, GroupError, JobError, RankGroup
from distributed.ranks import processes
from distributed.vae.job import DecodeJob, WeightSource
from tests.ranks.conftest import ECHO
from tests.ranks.misbehaving import GIB, Echo, keep
from tests.ranks.moments import during, pids, until

X = torch.arange(64.0)
LONG = Echo(X, steps=20, seconds=0.1)
ENDLESS = Echo(X, steps=2000, seconds=0.1)


def run(group: RankGroup, job: Echo = LONG, **options) -> None:
    assert torch.equal(group.run(job, **options)["y"], job.x + 1)


def in_thread(call) -> tuple[threading.Thread, list]:
    """Start `call` in a thread. Its result or exception is appended to the returned list."""
    outcome = []

    def body() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, outcome


def test_a_cancel_ends_the_job_soon_and_keeps_the_ranks(echoes):
    before, cancelled_at = pids(echoes), []

    def cancel() -> None:
        cancelled_at.append(time.monotonic())
        echoes.cancel()

    thread = during(echoes, cancel)
    with pytest.raises(Cancelled):
        echoes.run(ENDLESS)
    assert time.monotonic() - cancelled_at[0] < 5
    thread.join()
    run(echoes, Echo(X))
    assert pids(echoes) == before


def test_a_timeout_ends_the_job_and_keeps_the_ranks(echoes):
    before = pids(echoes)
    with pytest.raises(TimeoutError, match="The echo took longer than its timeout"):
        echoes.run(ENDLESS, timeout=1)
    run(echoes, Echo(X))
    assert pids(echoes) == before


def test_a_cancel_ends_queued_jobs(echoes):
    first, ended = in_thread(lambda: echoes.run(ENDLESS))
    assert until(lambda: echoes.status()["state"] == "busy", 10)
    waiting, cancelled = in_thread(lambda: echoes.run(LONG))
    assert until(lambda: len(echoes._callers) == 2, 10)
    echoes.cancel()
    waiting.join(5)
    first.join(10)
    assert [type(outcome) for outcome in ended + cancelled] == [Cancelled, Cancelled]
    run(echoes, Echo(X))


def test_stop_ends_running_and_queued_jobs_and_starts_no_process():
    with RankGroup(["cpu"], worker=ECHO) as group:
        threads = [in_thread(lambda: group.run(ENDLESS)) for _ in range(3)]
        assert until(lambda: len(group._callers) == 3 and group.status()["state"] == "busy", 10)
        launcher = group._supervisor.ranks.launcher
        group.stop()
        for thread, outcome in threads:
            thread.join(10)
            assert [type(o) for o in outcome] == [Cancelled]
        time.sleep(0.5)
        assert group.status()["state"] == "stopped" and group._supervisor.ranks is None
        assert launcher.poll() is not None
        run(group, Echo(X))


def test_a_timeout_ends_a_queued_job(echoes):
    first, _ = in_thread(lambda: echoes.run(ENDLESS))
    assert until(lambda: echoes.status()["state"] == "busy", 10)
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        echoes.run(LONG, timeout=0.5)
    assert time.monotonic() - begun < 5
    echoes.cancel()
    first.join()


def test_decodes_from_several_threads_are_queued_and_two_groups_run_concurrently(pair, vae):
    results = {}
    with RankGroup(devices=["cpu"]) as other:
        threads = [
            threading.Thread(
                target=lambda i=i: results.update(
                    {i: (pair, other)[i % 2].decode(random_latent(1, 32, 2, 2, 3, seed=i), vae)}
                )
            )
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(4):
        torch.testing.assert_close(
            results[i], pair.decode(random_latent(1, 32, 2, 2, 3, seed=i), vae), atol=1e-5, rtol=0
        )


@pytest.mark.alone
def test_a_short_job_has_little_overhead(echoes):
    job = Echo(X)
    run(echoes, job)
    begun = time.monotonic()
    for _ in range(50):
        echoes.run(job)
    assert (time.monotonic() - begun) / 50 < 0.05  # a poll instead of a notification would take 0.1 s


def test_tensors_of_all_dtypes_and_sizes_are_passed_to_the_ranks_and_back(echoes):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8):
        x = torch.arange(24).reshape(4, 2, 3).to(dtype)
        assert torch.equal(echoes.run(Echo(x))["y"], x + 1)
    assert echoes.run(Echo(torch.empty(0, 3)))["y"].shape == (0, 3)


def test_data_that_a_job_needs_is_loaded_if_it_is_missing_also_after_a_restart(echoes):
    job = Echo(X, needs="ten", loads=(keep("ten", 10),))
    for _ in range(2):
        assert torch.equal(echoes.run(job)["y"], X + 11)
    os.kill(pids(echoes)[0], signal.SIGKILL)
    assert torch.equal(echoes.run(job)["y"], X + 11)
    echoes.release()
    assert torch.equal(echoes.run(job)["y"], X + 11)
    with pytest.raises(JobError, match="eleven was not loaded"):
        echoes.run(Echo(X, needs="eleven"))


def test_an_idle_task_is_released_only_if_another_task_needs_its_memory():
    with RankGroup(["cpu"], worker=ECHO) as group:
        released = {"extra": {"released": True}}
        run(group, Echo(X))
        run(group, Echo(X, kind="other"))
        assert float(group.run(Echo(X, **released))["y"][0]) == 0
        run(group, Echo(X, kind="other", wants=2**60))
        assert float(group.run(Echo(X, **released))["y"][0]) == 1


def test_room_is_requested_if_free_memory_is_not_enough_for_full_speed(echoes):
    requests = []
    for wants, times in ((0, 0), (2**60, 1)):
        run(echoes, Echo(X, wants=wants), make_room=lambda: requests.append(threading.current_thread()))
        assert requests == [threading.current_thread()] * times


def test_room_is_requested_before_a_job_that_ran_out_of_memory_is_retried_with_a_smaller_limit(echoes):
    events = []
    run(echoes, Echo(X, fits_in=7 * GIB), make_room=lambda: events.append("room"), notice=events.append)
    assert events[0] == "room" and [event.split()[0] for event in events[1:]] == ["Not"]


def test_idle_tasks_are_released_only_after_room_was_requested():
    with RankGroup(["cpu"], worker=ECHO) as group:
        released = Echo(X, extra={"released": True})
        run(group, Echo(X))

        def fail() -> None:
            raise RuntimeError("no room")

        with pytest.raises(RuntimeError, match="no room"):
            run(group, Echo(X, kind="other", wants=2**60), make_room=fail)
        assert float(group.run(released)["y"][0]) == 0
        run(group, Echo(X, kind="other", wants=2**60), make_room=lambda: None)
        assert float(group.run(released)["y"][0]) == 1


def test_a_job_that_cannot_be_encoded_is_refused_and_the_ranks_keep_running(echoes):
    before = pids(echoes)
    for bad in (float("nan"), float("inf"), {1, 2}, "x" * 2**21):
        with pytest.raises(JobError, match="The echo cannot be sent to the ranks"):
            echoes.run(Echo(X, extra={"bad": bad}))
    for job in (Echo(X, kind="x" * 65), Echo(X.double()), Echo(X.view([1] * 8 + [64]))):
        with pytest.raises(JobError, match="The echo cannot be sent to the ranks"):
            echoes.run(job)
    with pytest.raises(JobError, match="no task of the kind 'dance'"):
        echoes.run(Echo(X, kind="dance"))
    run(echoes, Echo(X))
    assert pids(echoes) == before


def test_running_out_of_memory_is_retried_with_a_smaller_limit_and_reported(echoes):
    before, notices = pids(echoes), []
    run(echoes, Echo(X, fits_in=3 * GIB), notice=notices.append)
    assert notices[0].startswith("Not enough memory on cpu: the echo needs 8.00 GiB, 4.00 GiB is available.")
    assert notices[0].endswith("Retrying with a limit of 3.60 GiB.")
    assert notices[1].endswith("Retrying with a limit of 2.70 GiB.")
    assert pids(echoes) == before


def test_insufficient_memory_is_reported_with_the_numbers(echoes):
    before, notices = pids(echoes), []
    with pytest.raises(JobError, match=r"^Not enough memory on cpu: the echo needs .* GiB, 4.00 GiB is available"):
        echoes.run(Echo(X, fits_in=0), notice=notices.append)
    assert len(notices) == 3
    with pytest.raises(JobError, match=r"the echo needs 8\.00 GiB, 4\.00 GiB is available"):
        echoes.run(Echo(X, fits_in=0, smallest_plan=True), notice=notices.append)
    assert len(notices) == 3 and pids(echoes) == before


def test_progress_is_reported_as_a_change_and_starts_at_zero_for_each_job(echoes):
    run(echoes, Echo(X))
    changes = []
    echoes.on_change = lambda: changes.append(echoes.status())
    try:
        run(echoes, step=(2, 3))
    finally:
        echoes.on_change = lambda: None
    assert {status["job"] for status in changes if status["state"] == "busy"} == {"echo"}
    assert [2, 3] in [status["step"] for status in changes if status["state"] == "busy"]
    assert changes[-1]["state"] == "ready" and changes[-1]["job"] is None and changes[-1]["step"] is None
    busy = [rank for s in changes if s["state"] == "busy" for rank in s["ranks"] if rank["state"] == "busy"]
    assert busy[0]["done"] == busy[0]["total"] == 0
    assert any(0 < rank["done"] < rank["total"] for rank in busy)


def test_a_preload_after_a_series_shows_no_step(vae):
    with RankGroup(["cpu"]) as group:
        group.run(DecodeJob.make(random_latent(1, 32, 1, 2, 2), WeightSource.find(vae), "seamless"), step=(2, 2))
        changes = []
        group.on_change = lambda: changes.append(group.status())
        group.release()
        group.preload(vae)
        assert until(lambda: any(status["job"] for status in changes), 30)
        assert until(lambda: group.status()["state"] == "ready", 30)
        group.on_change = lambda: None
    assert [status["step"] for status in changes if status["job"] and status["step"]] == []


def test_an_exception_in_on_change_does_not_fail_the_job(echoes, caplog):
    def fail() -> None:
        raise RuntimeError("an error in the callback")

    echoes.on_change = fail
    try:
        run(echoes, Echo(X))
    finally:
        echoes.on_change = lambda: None
    assert "The on_change callback failed." in caplog.text


def test_an_interruption_while_a_job_is_sent_does_not_affect_later_jobs(echoes, monkeypatch):
    def interrupted(*args) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.RankProcesses, "send_frame", interrupted)
    with pytest.raises(KeyboardInterrupt):
        echoes.run(Echo(X))
    run(echoes, Echo(X), timeout=60)


def test_a_start_without_enough_resources_reports_the_error_and_leaves_no_files(monkeypatch, temporary):
    def fail(*args, **options) -> None:
        raise RuntimeError("can't start new thread")

    group, before = RankGroup(["cpu"], worker=ECHO), set(temporary.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(processes, "Listener", fail)
        with pytest.raises(GroupError, match="cannot be started: can't start new thread"):
            group.start(wait=True)
    assert set(temporary.iterdir()) == before
    group.start(wait=True)
    group.stop()


def test_a_group_that_cannot_start_reports_the_reason():
    group = RankGroup(devices=["cpu", "cpu"], worker="distributed.no_such_module", start_timeout=60)
    with pytest.raises(GroupError, match="launcher ended with exit code"):
        group.start(wait=True)
    assert group.status()["state"] == "failed"
    group.stop()


def test_a_start_fails_after_start_timeout_if_a_rank_does_not_connect(tmp_path, monkeypatch):
    fault = tmp_path / "fault"
    fault.write_text("late 1")
    monkeypatch.setenv("HV15_TEST_FAULT", str(fault))
    group = RankGroup(["cpu", "cpu"], worker=ECHO, start_timeout=12)
    with pytest.raises(GroupError, match=r"rank 1 \(cpu\).* did not become ready within 12 seconds"):
        group.start(wait=True)
    group.stop()


def test_stop_during_a_start_leaves_no_thread_and_no_process():
    before = set(threading.enumerate())
    group = RankGroup(devices=["cpu", "cpu"], worker=ECHO)
    group.start()
    assert until(lambda: group._supervisor.ranks is not None, 10)
    launcher = group._supervisor.ranks.launcher
    group.stop()
    assert launcher.poll() is not None
    assert until(lambda: set(threading.enumerate()) <= before, 5)
    group.start(wait=True)
    assert group.status()["state"] == "ready"
    group.stop()


def test_a_group_that_is_stopped_before_its_preload_stays_stopped(vae):
    group = RankGroup(["cpu"])
    with group._turns:  # so that the preload waits for its turn
        group.preload(vae)
        group.start(wait=True)
        group.stop()
    assert until(lambda: not any(thread.name == "hv15-preload" for thread in threading.enumerate()), 10)
    assert group.status()["state"] == "stopped"


@pytest.mark.parametrize(("keep", "state"), [("keep", "starting"), ("release", "starting"), ("stop", "stopped")])
def test_the_end_of_a_series_does_not_wait_for_a_preload(vae, keep, state):
    group = RankGroup(["cpu"], keep_loaded=keep)
    group.preload(vae)
    assert until(group._turns.locked, 10)
    group.finish()
    assert group.status()["state"] == state
    group.stop()


def test_a_cancel_during_a_start_ends_the_job_at_once_and_the_group_starts():
    group = RankGroup(devices=["cpu", "cpu"], worker=ECHO)
    with pytest.raises(Cancelled):
        group.run(Echo(X), cancelled=lambda: group.status()["state"] == "starting")
    assert group.status()["state"] == "starting"
    group.start(wait=True)
    group.stop()


def test_outputs_stay_valid_after_a_stop_and_free_their_memory_when_they_are_deleted():
    def shared() -> int:
        return sum("hv15-" in str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())

    gc.collect()
    before = shared()
    with RankGroup(devices=["cpu"], worker=ECHO) as group:
        outputs = group.run(Echo(X))
    assert shared() > before and outputs["y"].isfinite().all()
    del outputs
    gc.collect()
    assert shared() == before


def test_idle_ranks_use_no_cpu_time(echoes):
    run(echoes, Echo(X))

    def used() -> float:
        processes = [echoes._supervisor.ranks.launcher.pid, *pids(echoes)]
        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in processes)

    before = used()
    time.sleep(3)
    assert used() - before < 0.15  # of 9 seconds


def test_a_group_that_a_test_leaves_running_would_be_noticed(leaks):
    group = RankGroup(["cpu"], worker=ECHO)
    group.start()
    try:
        assert any(name.startswith(f"group {group.id}") for name in leaks())
    finally:
        group.stop()
    assert until(lambda: not leaks(), 10)
