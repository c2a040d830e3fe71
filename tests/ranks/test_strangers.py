"""Access to a group: unauthenticated connections, invalid messages, permissions of files, open ports, and logs."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.random_weights import random_latent
from distributed import GroupError, RankGroup
from distributed.ranks import listener as listener_module
from distributed.ranks.listener import connect, shake_hands
from distributed.ranks.protocol import BROKEN, Beat, Done, Hello, Ready
from tests.ranks.conftest import ECHO
from tests.ranks.misbehaving import Echo
from tests.ranks.moments import pids, until

ROOT = Path(__file__).resolve().parents[2]
X = torch.arange(8.0)


def ranks_of(group: RankGroup):
    return group._supervisor.ranks


def key_of(group: RankGroup) -> bytes:
    return (ranks_of(group).folder / "key").read_bytes()


def replay(address: tuple[str, int], key: bytes) -> None:
    """Answer the second challenge with the proof for the first."""
    sent = []

    class Recorder:
        def __init__(self, connection: socket.socket) -> None:
            self.recv = connection.recv
            self.connection = connection

        def sendall(self, data: bytes) -> None:
            sent.append(data)
            self.connection.sendall(data)

    with socket.create_connection(address, timeout=5) as first:
        shake_hands(Recorder(first), key)
    with socket.create_connection(address, timeout=5) as second:
        second.recv(32)
        second.sendall(sent[0])
        if not second.recv(32):
            raise EOFError


def test_unauthenticated_connections_are_refused_and_the_ranks_keep_running(echoes, caplog):
    listener, before = ranks_of(echoes).listener, pids(echoes)
    assert listener.address[0] == "127.0.0.1"
    listener._warned = False
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, bytes(64), struct.pack("!I", 2**32 - 1)):
        with socket.create_connection(listener.address, timeout=5) as stranger:
            stranger.sendall(data)
    for key in (b"", b"wrong", os.urandom(32)):
        with pytest.raises(BROKEN), socket.create_connection(listener.address, timeout=5) as stranger:
            shake_hands(stranger, key)
    with pytest.raises(BROKEN):
        replay(listener.address, key_of(echoes))
    silent = [socket.create_connection(listener.address, timeout=5) for _ in range(20)]
    assert torch.equal(echoes.run(Echo(X))["y"], X + 1)
    for connection in silent:
        connection.close()
    assert sum("unauthenticated" in record.message for record in caplog.records) == 1
    assert pids(echoes) == before


def test_hundreds_of_open_connections_exhaust_no_descriptors_and_no_threads_and_the_ranks_start():
    """The connections are opened before the ranks connect, and reopened when they are closed."""
    group, seen = RankGroup(["cpu", "cpu"], worker=ECHO), []
    process = psutil.Process()
    group.start()
    assert until(lambda: ranks_of(group) is not None, 20)
    address, descriptors, threads = ranks_of(group).listener.address, process.num_fds(), process.num_threads()
    code = (
        "import socket, sys, time; held = []\n"
        "limit = time.monotonic() + 100\n"
        "while time.monotonic() < limit:\n"
        "    held.append(socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=5))\n"
        "    if len(held) == 300: print('300', flush=True)\n"
        "    if len(held) > 400: held.pop(0).close()\n"
        "    time.sleep(0.002)\n"
    )
    crowd = subprocess.Popen([sys.executable, "-c", code, str(address[1])], stdout=subprocess.PIPE, text=True)
    try:
        assert crowd.stdout.readline() == "300\n"
        for _ in range(20):
            seen.append((process.num_fds() - descriptors, process.num_threads() - threads))
            time.sleep(0.02)
        group.start(wait=True)
        assert torch.equal(group.run(Echo(X))["y"], X + 1)
        assert crowd.poll() is None
    finally:
        crowd.kill()
        crowd.wait()
        crowd.stdout.close()
        group.stop()
    assert max(count for count, _ in seen) <= listener_module.HANDSHAKES + 8, seen
    assert max(count for _, count in seen) <= 4, seen


def test_a_listener_that_cannot_start_a_thread_for_a_rank_keeps_listening(monkeypatch, caplog):
    admitted = []
    listener = listener_module.Listener(b"key", admitted.append)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "hv15-rank":
            raise RuntimeError("can't start new thread")
        start(thread)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            channel = connect(listener.address, b"key")
            with pytest.raises(BROKEN):
                channel.receive()
            channel.close()
        assert admitted == [] and "can't start new thread" in caplog.text
        connect(listener.address, b"key").close()
        assert until(lambda: len(admitted) == 1, 5)
    finally:
        listener.close()


def test_a_listener_out_of_descriptors_uses_little_cpu_time_and_closes():
    code = (
        "import os, resource, socket, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from distributed.ranks.listener import Listener\n"
        "listener = Listener(b'key', print); caller = socket.socket()\n"
        "most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir('/proc/self/fd'))), most))\n"
        "while True:\n"
        "    try: os.dup(0)\n"
        "    except OSError: break\n"
        "caller.connect(listener.address); before = time.process_time(); time.sleep(2)\n"
        "used = time.process_time() - before; begun = time.monotonic(); listener.close()\n"
        "print(used < 0.5, time.monotonic() - begun < 5)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE, text=True, timeout=60)
    assert ended.stdout.split() == ["True", "True"]


def test_a_process_that_the_launcher_did_not_start_is_not_killed(tmp_path, monkeypatch, caplog):
    """A program with the key sends `Hello` for a rank that has not connected, with the id of another process."""
    fault = tmp_path / "fault"
    fault.write_text("late 0")
    monkeypatch.setenv("HV15_TEST_FAULT", str(fault))
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    group = RankGroup(["cpu"], worker=ECHO)
    try:
        group.start()
        assert until(lambda: ranks_of(group) is not None, 20)
        channel = connect(ranks_of(group).listener.address, key_of(group))
        channel.send(Hello(0, bystander.pid, "cpu"))
        with pytest.raises(BROKEN):
            channel.receive()
        channel.close()
        assert f"process {bystander.pid} was not started by this group's launcher" in caplog.text
        group.stop()
        assert bystander.poll() is None
    finally:
        group.stop()
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("first", [Ready(), Beat(0, 0, 0, 0), Done(1, 5, 5), Hello(64, 1, "cpu"), Hello(0, 1, "cpu")])
def test_a_program_with_the_key_that_is_not_a_rank_is_refused_and_cannot_answer_a_job(echoes, first):
    before = pids(echoes)
    channel = connect(ranks_of(echoes).listener.address, key_of(echoes))
    channel.send(first)
    with pytest.raises(BROKEN):
        channel.receive()
    channel.close()
    assert torch.equal(echoes.run(Echo(X))["y"], X + 1)
    assert pids(echoes) == before


INVALID = {
    "unknown type": '{"type": "Dance"}',
    "NaN": '{"type": "Beat", "id": ID, "done": NaN, "total": 0, "moved": 1}',
    "deeply nested": "[" * 20000 + "]" * 20000,
    "done before all work is complete": '{"type": "Done", "id": ID, "done": 1, "total": 100}',
}
"""More invalid messages are in tests/unit/test_protocol.py."""


@pytest.mark.parametrize("frame", [pytest.param(frame, id=name) for name, frame in INVALID.items()])
def test_a_rank_that_sends_an_invalid_message_is_replaced_and_its_job_is_retried(echoes, once, frame):
    notices, before = [], pids(echoes)
    job = Echo(X, fault="send", frame=frame, once=once)
    assert torch.equal(echoes.run(job, notice=notices.append, timeout=60)["y"], X + 1)
    assert len(notices) == 1 and "rank 1 (cpu)" in notices[0] and "sent an invalid message" in notices[0]
    assert set(before).isdisjoint(pids(echoes))


def test_a_message_with_a_length_of_gigabytes_is_refused_before_it_is_read(echoes, once):
    notices = []
    memory = psutil.Process().memory_info().rss
    assert torch.equal(echoes.run(Echo(X, fault="long", once=once), notice=notices.append)["y"], X + 1)
    assert "a message of 4294967295 bytes; the limit is 65536" in notices[0]
    assert psutil.Process().memory_info().rss < memory + 2**28


def test_a_rank_exits_when_it_receives_an_invalid_message(echoes):
    with contextlib.suppress(GroupError):  # the ranks may have broken while idle
        echoes.start(wait=True)
    before = set(pids(echoes))
    assert torch.equal(echoes.run(Echo(X))["y"], X + 1)
    ranks_of(echoes).records[0].channel.send_frame(b'{"type": "Dance"}')
    assert until(lambda: echoes.status()["state"] == "recovering", 5)
    assert until(lambda: echoes.status()["state"] == "ready", 60)
    assert before.isdisjoint(pids(echoes))


def test_files_of_a_group_are_private_and_removed_when_it_stops():
    group = RankGroup(devices=["cpu"], worker=ECHO)
    group.start(wait=True)
    folder = ranks_of(group).folder
    for path in [folder, folder / "key"]:
        assert path.stat().st_mode & 0o077 == 0, path
    group.stop()
    assert not folder.exists() and group.status()["state"] == "stopped"
    assert torch.equal(group.run(Echo(X))["y"], X + 1), "a stopped group starts again when needed"
    group.stop()


def test_no_file_of_a_group_holds_a_pickle(pair, vae):
    """A pickle can execute code when it is loaded. It is recognised by its first bytes, plain or in base64."""
    pair.decode(random_latent(1, 32, 1, 1, 2), vae)
    files = [file for file in ranks_of(pair).folder.rglob("*") if file.is_file()]
    assert {"key", "rendezvous"} <= {file.name for file in files}
    for file in files:
        assert not any(mark in file.read_bytes() for mark in (b"\x80\x04\x95", b"gASV")), file.name


def test_no_process_listens_beyond_loopback(pair):
    processes = [psutil.Process(pid) for pid in [ranks_of(pair).launcher.pid, *pids(pair)]]
    for process in processes:
        listening = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert set(listening) <= {"127.0.0.1"}, process.cmdline()


def test_logs_are_private_and_limited_in_size(tmp_path, once):
    with RankGroup(["cpu"], worker=ECHO, logs=tmp_path / "logs") as group:
        group.run(Echo(X, fault="chatter", rank=0, once=once))
        (folder,) = (tmp_path / "logs").iterdir()
        assert until(lambda: (folder / "rank-0.old.log").exists(), 5)
        assert (folder / "rank-0.log").stat().st_size < 2**20
        for path in [folder, *folder.iterdir()]:
            assert path.stat().st_mode & 0o077 == 0, path
    assert (folder / "rank-0.old.log").exists()
