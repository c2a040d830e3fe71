"""Messages of the control connection are decoded as they were encoded, and anything else is refused."""

import json
import socket
import struct
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distributed.ranks import protocol
from distributed.ranks.buffers import SharedTensor
from distributed.ranks.listener import Listener, connect
from distributed.ranks.protocol import (
    BROKEN,
    TO_CONTROLLER,
    TO_RANK,
    Beat,
    Cancel,
    Channel,
    Done,
    Failed,
    Hello,
    Load,
    Ready,
    Release,
    Released,
    Run,
    Stop,
    decode,
    encode,
)
from distributed.ranks.states import RankState
from distributed.ranks.status import RankStatus

X = SharedTensor("memfd:somewhere", "float32", (1, 32, 0))
MESSAGES = [
    Load(1, "decode", {"dtype": "float32", "list": [1, 2.5, None, True, "é"]}),
    Run(2**53, "echo", {}, {"x": X}, {"y": X, "z": X}),
    Cancel(0),
    Release(),
    Stop(),
    Hello(63, 1234, "cuda:7"),
    Ready(),
    Released(),
    Beat(1, 2, 3, 4),
    Done(1, 5, 5),
    Failed(1, "memory", "too little", True, 2**40, 2**30, True),
]
BAD_VALUES = [None, True, -1, 1.5, "1", "", [], [1], {}, {"a": 1}, 2**64, "x" * 10**4]


def direction(message: object):
    return TO_RANK if type(message) in TO_RANK.messages else TO_CONTROLLER


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_decoded_as_it_was_encoded_and_only_in_its_direction(message):
    frame = encode(message)
    assert decode(frame, direction(message)) == message
    with pytest.raises(ValueError, match="unknown message"):
        decode(frame, TO_RANK if direction(message) is TO_CONTROLLER else TO_CONTROLLER)


def test_the_examples_include_every_message():
    assert {type(message) for message in MESSAGES} == {*TO_RANK.messages, *TO_CONTROLLER.messages}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_with_a_missing_unknown_or_wrongly_typed_field_is_refused(message):
    fields = json.loads(encode(message))
    for name in fields.keys() - {"type"}:
        with pytest.raises(ValueError):
            decode(
                json.dumps({key: value for key, value in fields.items() if key != name}).encode(), direction(message)
            )
        accepted = 0
        for bad in BAD_VALUES:
            try:
                decode(json.dumps({**fields, name: bad}).encode(), direction(message))
                accepted += 1
            except ValueError as error:
                assert len(str(error)) < 400
        assert accepted <= 3, f"{name} accepts nearly every value"
    with pytest.raises(ValueError, match="has the fields"):
        decode(json.dumps({**fields, "more": 1}).encode(), direction(message))


@pytest.mark.parametrize(
    "shared",
    [
        {"place": 1, "dtype": "float32", "shape": [1]},
        {"place": "", "dtype": "object", "shape": [1]},
        {"place": "", "dtype": ["float32"], "shape": [1]},
        {"place": "", "dtype": "float32", "shape": [-1]},
        {"place": "", "dtype": "float32", "shape": [1.0]},
        {"place": "", "dtype": "float32", "shape": 3},
        {"place": "", "dtype": "float32", "shape": [1] * 9},
        {"place": "x" * 5000, "dtype": "float32", "shape": [1]},
        {"place": "", "dtype": "float32"},
        "memfd:",
    ],
)
def test_an_invalid_shared_tensor_is_refused(shared):
    frame = json.dumps({"type": "Load", "id": 1, "kind": "echo", "fields": {}, "inputs": {"x": shared}}).encode()
    with pytest.raises(ValueError, match=r"Load\.inputs"):
        decode(frame, TO_RANK)


INVALID = {
    "not JSON": "\x00garbage",
    "not an object": "[1, 2]",
    "unknown type": '{"type": "Dance"}',
    "no type": "{}",
    "type is a list": '{"type": ["Done"]}',
    "wrong direction": '{"type": "Stop"}',
    "additional field": '{"type": "Done", "id": 5, "done": 0, "total": 0, "more": 1}',
    "missing field": '{"type": "Done", "id": 5}',
    "string instead of a number": '{"type": "Beat", "id": 5, "done": "0", "total": 0, "moved": 1}',
    "boolean instead of a number": '{"type": "Beat", "id": 5, "done": true, "total": 1, "moved": 1}',
    "NaN": '{"type": "Beat", "id": 5, "done": NaN, "total": 0, "moved": 1}',
    "overflow": '{"type": "Beat", "id": 5, "done": 0, "total": 1e999, "moved": 1}',
    "negative": '{"type": "Beat", "id": 5, "done": -1, "total": 0, "moved": 1}',
    "too large": '{"type": "Beat", "id": 5, "done": 0, "total": ' + "9" * 400 + ', "moved": 1}',
    "deeply nested": "[" * 20000 + "]" * 20000,
    "more done than the total": '{"type": "Beat", "id": 5, "done": 5, "total": 4, "moved": 1}',
    "progress of a later job": '{"type": "Beat", "id": 6, "done": 0, "total": 0, "moved": 1}',
    "done before all work is complete": '{"type": "Done", "id": 5, "done": 1, "total": 100}',
    "done with an earlier job": '{"type": "Done", "id": 4, "done": 0, "total": 0}',
    "failed in a later job": encode(Failed(6, "error")).decode(),
    "unknown reason": encode(Failed(5, "error")).decode().replace('"error"', '"mood"'),
    "released while busy": '{"type": "Released"}',
    "ready while busy": '{"type": "Ready"}',
    "hello while busy": '{"type": "Hello", "rank": 1, "pid": 1, "device": "cpu"}',
}


@pytest.mark.parametrize("frame", INVALID.values(), ids=INVALID)
def test_messages_of_a_busy_rank_other_than_its_progress_and_its_answer_are_refused(frame):
    status = RankStatus(1, "cpu")
    status.hear(Ready())
    status.begin(5, RankState.BUSY)
    with pytest.raises(ValueError):
        status.hear(decode(frame.encode(), TO_CONTROLLER))
    assert status.answer is None and status.done == status.total == 0
    for message in (Beat(4, 9, 9, 1), Beat(5, 1, 4, 2), Done(5, 4, 4)):  # a late heartbeat of an earlier job is ignored
        status.hear(message)
    assert (status.answer, status.done, status.state) == (Done(5, 4, 4), 4, RankState.READY)
    with pytest.raises(ValueError, match="unexpected"):
        status.hear(Done(5, 4, 4))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_a_value_error(frame):
    with pytest.raises(ValueError):
        decode(frame, TO_CONTROLLER)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
        max_leaves=20,
    ),
    st.sampled_from([*TO_CONTROLLER.messages, *TO_RANK.messages]),
)
def test_any_json_is_a_valid_message_or_refused_with_a_value_error(value, message):
    value = {**value, "type": message.__name__} if isinstance(value, dict) else value
    for allowed in (TO_CONTROLLER, TO_RANK):
        try:
            assert type(decode(json.dumps(value).encode(), allowed)) in (Ready, Released, Release, Stop)
        except ValueError as error:
            assert len(str(error)) < 400


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
def test_numbers_that_are_not_finite_or_too_long_are_refused(number):
    with pytest.raises(ValueError):
        decode(
            f'{{"type": "Load", "id": 1, "kind": "a", "fields": {{"x": {number}}}, "inputs": {{}}}}'.encode(), TO_RANK
        )


def test_json_that_is_nested_too_deeply_is_refused():
    with pytest.raises(ValueError, match="nested too deeply"):
        decode(b'{"a":' * 10**5 + b"1" + b"}" * 10**5, TO_RANK)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1}, torch.zeros(1), "x" * 2**20])
def test_values_that_cannot_be_encoded_are_refused_before_they_are_sent(bad):
    with pytest.raises(ValueError):
        encode(Load(1, "echo", {"bad": bad}))


def test_a_channel_refuses_a_message_that_is_too_long_or_truncated():
    for sent in (struct.pack("!I", TO_CONTROLLER.limit + 1), struct.pack("!I", 100) + b"{", b"\0\0"):
        here, there = tcp_pair()
        channel = Channel(here, TO_CONTROLLER)
        there.sendall(sent)
        there.close()
        with pytest.raises(BROKEN):
            channel.receive()
        channel.close()


def test_sending_to_a_peer_that_receives_nothing_times_out(monkeypatch):
    monkeypatch.setattr(protocol, "SEND_SECONDS", 1)
    here, there = tcp_pair()
    channel = Channel(here, TO_CONTROLLER)
    begun = time.monotonic()
    with there, pytest.raises(BROKEN):
        while True:
            channel.send(Load(1, "echo", {"filler": "x" * 2**19}))
    assert time.monotonic() - begun < 10
    channel.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        caller = socket.create_connection(server.getsockname())
        return server.accept()[0], caller


def test_a_rank_and_a_listener_with_the_same_key_connect():
    received = []
    listener = Listener(b"key", lambda channel: received.append(channel.receive()))
    try:
        channel = connect(listener.address, b"key")
        channel.send(Ready())
        limit = time.monotonic() + 5
        while not received and time.monotonic() < limit:
            time.sleep(0.05)
        assert received == [Ready()]
        channel.close()
    finally:
        listener.close()


def test_a_rank_refuses_a_listener_that_does_not_know_the_key():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pretend() -> None:
            with server.accept()[0] as caller:
                caller.sendall(bytes(32))
                caller.recv(64)
                caller.sendall(bytes(32))

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(ValueError, match="does not know the group's key"):
            connect(server.getsockname(), b"key")
        thread.join()
