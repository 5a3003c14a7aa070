"""The control channel: whole messages, however the sockets split them."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.retry_policy import RetryPolicy
from receiver.worker.handler_process.ipc import (
    Channel,
    Ended,
    FromChild,
    LaneDone,
    Log,
    ProtocolViolation,
    RunLanes,
    RunResponder,
    Started,
    ToChild,
)

Ends = tuple[Channel, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A channel that takes frames of 1 MiB, and the raw socket at its other end."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours, 1 << 20)
    yield channel, theirs
    channel.close()
    theirs.close()


def soon() -> float:
    return time.monotonic() + 30


ASK = RunResponder(
    handler="h",
    destination="d",
    timeout=1.5,
    until=2.5,
    largest=10,
    uuid="u",
    kind="k",
    source_id=None,
    log_id="l",
    message_id=None,
    transmission_id=None,
    facility=None,
    event_time=None,
    received_at=datetime(2026, 1, 2, 3, 4, 5, 678, UTC),
    test=True,
    raw=b"\x00\xff" * 500_000,
)
RUN = RunLanes(
    lanes=(("h/d/source:s", 7), ("h/d/source:t", 1)),
    owner="o",
    handler="h",
    destination="d",
    timeout=1,
    until=2,
    leave_at=3,
    policy=RetryPolicy(max_attempts=3, on_failure="hold", unordered=True),
)


@pytest.mark.parametrize(
    ("printed", "kinds"),
    [
        (ASK, ToChild),
        (RUN, ToChild),
        (Started(lane="h/d/source:s", delivery=1 << 60, attempt=2, deferred_for=1.25), FromChild),
        (LaneDone(why="dead", error_class="E", must_recycle=True), FromChild),
        (Log(level="info", event="a.b", fields={"n": None}), FromChild),
    ],
)
def test_a_message_of_any_size(ends: Ends, printed: FromChild | ToChild, kinds: object) -> None:
    """A message of any size arrives unchanged."""
    channel, theirs = ends
    other = Channel(theirs, 1 << 20)
    sending = threading.Thread(target=other.send, args=(printed,))
    sending.start()
    assert channel.receive(kinds, soon()) == printed
    sending.join(30)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_in_any_pieces(cuts: list[int]) -> None:
    """Messages arrive whole and in order, however their bytes are split."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        recorder = Channel(ours, 1 << 20)
        for number in range(5):
            recorder.send(Started(delivery=number))
        stream = theirs.recv(1 << 16)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel, heard, place = Channel(ours, 1 << 20), [], 0
        while place < len(stream):
            cut = cuts[place % len(cuts)]
            theirs.sendall(stream[place : place + cut])
            place += cut
            while (printed := channel.receive(FromChild, 0.0)) is not None:
                heard.append(printed.delivery)
    assert heard == [0, 1, 2, 3, 4]


def test_the_deadline(ends: Ends) -> None:
    """None is returned at the deadline; half a message is not returned."""
    channel, theirs = ends
    assert channel.receive(FromChild, 0.0) is None
    theirs.sendall(b"\x00\x00\x00\x05\x00")
    assert channel.receive(FromChild, time.monotonic() + 0.01) is None


def test_another_descriptor(ends: Ends) -> None:
    """None is returned when another descriptor is ready, but only after the messages that came before."""
    channel, theirs = ends
    reading, writing = os.pipe()
    try:
        Channel(theirs, 1 << 20).send(Ended())
        os.write(writing, b"x")
        assert channel.receive(FromChild, soon(), reading) == Ended()
        assert channel.receive(FromChild, soon(), reading) is None
    finally:
        os.close(reading)
        os.close(writing)


def test_the_other_end_is_gone(ends: Ends) -> None:
    """A closed channel is an error, after the messages that came before."""
    channel, theirs = ends
    Channel(theirs, 1 << 20).send(Ended())
    theirs.close()
    assert channel.receive(FromChild, soon()) == Ended()
    with pytest.raises(EOFError):
        channel.receive(FromChild, soon())


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x10\x00\x01",
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00\x00\x0c\x81\xa4type\xa5Hello",
    ],
)
def test_nonsense(ends: Ends, nonsense: bytes) -> None:
    """An invalid message of this direction is an error, before it takes memory."""
    channel, theirs = ends
    theirs.sendall(nonsense)
    with pytest.raises(ProtocolViolation):
        channel.receive(FromChild, soon())


def test_nobody_reads(ends: Ends) -> None:
    """Sending to a process that does not read fails at the socket's timeout."""
    channel, _ = ends
    channel._socket.settimeout(0.05)
    with pytest.raises(TimeoutError):
        channel.send(ASK)  # more than a socket keeps for its reader
