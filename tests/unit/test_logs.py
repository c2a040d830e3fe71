"""Log folders: old ones are removed, but no other files and no log of a running group."""

import logging
import os

import pytest

from distributed.ranks import logs
from distributed.ranks.logs import RUNS_KEPT, new_folder, open_launcher_log


def old_run(folder, number: int):
    run = folder / f"run-20200101-0000{number:02d}-abcdef{number:02d}"
    run.mkdir()
    (run / "rank-0.log").touch()
    return run


def test_the_oldest_logs_are_removed(tmp_path):
    runs = [old_run(tmp_path, number) for number in range(20)]
    new = new_folder(tmp_path, tmp_path / "private")
    assert sorted(tmp_path.iterdir()) == [*runs[-RUNS_KEPT + 1 :], new]


def test_other_files_in_the_folder_are_not_removed(tmp_path):
    names = ("run-1", "run-of-the-mill", "run-20200101-000000-abcdefgh", "runs", "run-20200101-000000-abcdefgh.old")
    others = [tmp_path / name for name in names]
    for other in others:
        other.mkdir()
        (other / "model.pt").touch()
    (link := tmp_path / "run-20200101-000000-aaaaaaaa").symlink_to(others[0])
    (file := tmp_path / "run-20200101-000000-bbbbbbbb").touch()
    for number in range(20):
        old_run(tmp_path, number)
    new_folder(tmp_path, tmp_path / "private")
    assert all((other / "model.pt").exists() for other in others) and link.exists() and file.exists()


def test_the_log_of_a_running_group_is_never_removed(tmp_path):
    running = old_run(tmp_path, 0)
    descriptor = open_launcher_log(running)
    for number in range(1, 20):
        old_run(tmp_path, number)
    new_folder(tmp_path, tmp_path / "private")
    assert running.exists()
    os.close(descriptor)
    new_folder(tmp_path, tmp_path / "private")
    assert not running.exists()


@pytest.mark.parametrize("given", [True, False])
def test_logs_are_written_to_the_groups_folder_if_needed_with_one_warning(tmp_path, caplog, given):
    (tmp_path / "file").touch()
    wanted = tmp_path / "file" / "logs" if given else None
    with caplog.at_level(logging.WARNING):
        for name in ("one", "two"):
            (private := tmp_path / name).mkdir()
            assert new_folder(wanted, private) == private / "logs"
    assert sum("cannot be written" in record.message for record in caplog.records) == given


def test_there_is_no_default_folder_without_a_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(logs.Path, "home", no_home)
    assert logs.default_folder() is None
