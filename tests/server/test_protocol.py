"""Our protocol class for uvicorn: endless heads, pipelining, lingering closes, deadlines."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator

import pytest

from receiver.server.client_connection import MAX_PIPELINED
from receiver.server.request_head import MAX_HEAD
from tests.support.server import Server, Wire, post
from tests.support.site import Site, message, sent
from tests.support.waiting import until

MIB = 1024 * 1024
CHUNKED: dict[str, str | None] = {"content_length": None, "transfer_encoding": "chunked"}
LIVEZ = b"GET /livez HTTP/1.1\r\nhost: receiver.test\r\n\r\n"


def endless(start: bytes, piece: bytes) -> Iterator[bytes]:
    """An endless request."""
    return itertools.chain([start], itertools.repeat(piece))


def sent_until_closed(server: Server, pieces: Iterator[bytes], most: int) -> tuple[bytes, int]:
    """Send until the server closes; return its reply and the bytes sent. Fails if it accepts more than `most`."""
    size = 0
    with server.wire(timeout=30) as wire:
        for piece in pieces:
            try:
                wire.socket.sendall(piece)
            except OSError:
                break
            size += len(piece)
            assert size < most
        reply = b""
        try:
            while data := wire.socket.recv(65536):
                reply += data
        except OSError:
            pass
    return reply, size


@pytest.mark.parametrize(
    ("start", "piece", "status"),
    [
        (b"POST /redox/lab HTTP/1.1\r\nx-a: ", 4096 * b"y", b"431"),
        (b"POST /redox/lab HTTP/1.1\r\nx-a", 4096 * b"y", b"431"),
        (b"POST /redox/lab HTTP/1.1\r\n", b"x-a: " + 4000 * b"y" + b"\r\n", b"431"),
        (b"POST /", 4096 * b"y", b"414"),
    ],
)
def test_a_head_without_end(server: Server, start: bytes, piece: bytes, status: bytes) -> None:
    """A head without end is refused at its limit, and is not kept in memory."""
    [worker] = server.workers()
    before = worker.memory_info().rss
    reply, _ = sent_until_closed(server, endless(start, piece), 16 * MIB)
    assert reply.startswith(b"HTTP/1.1 " + status) or not reply
    assert worker.memory_info().rss - before < 8 * MIB


@pytest.mark.parametrize("rest", [b"0\r\nx-a: ", b"2;x="], ids=["a trailer", "a chunk's extension"])
def test_chunks_without_end(site: Site, server: Server, rest: bytes) -> None:
    """Endless chunk extensions or trailers are not kept in memory; they end the request."""
    [worker] = server.workers()
    before, messages = worker.memory_info().rss, site.count("messages")
    start = sent(site, b"", CHUNKED) + b"2\r\n{}\r\n" + rest
    reply, size = sent_until_closed(server, endless(start, 4096 * b"y"), 64 * MIB)
    assert reply.startswith(b"HTTP/1.1 400") or not reply
    assert size > MAX_HEAD
    assert worker.memory_info().rss - before < 8 * MIB
    assert site.count("messages") == messages


def test_lines_without_a_request(server: Server) -> None:
    """Empty lines before a request are allowed for a limited time."""
    with server.wire(timeout=60) as wire:
        began = time.monotonic()
        wire.socket.settimeout(0.5)
        while time.monotonic() - began < 60:
            wire.send(b"\r\n")
            try:
                if wire.socket.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionResetError:
                break
        assert time.monotonic() - began < 30


def test_more_than_may_be_pipelined(site: Site, server: Server) -> None:
    """A client that sends requests without waiting has at most MAX_PIPELINED in memory. Replies keep the order, and the
    connection closes.
    """
    with server.wire(timeout=60) as wire:
        wire.send(LIVEZ * (MAX_PIPELINED + 100))
        answers = []
        try:
            while True:
                answers.append(wire.answer().status)
        except (EOFError, ConnectionResetError):
            pass
    assert set(answers[:MAX_PIPELINED]) == {200}
    assert answers[MAX_PIPELINED:] in ([400], [])
    assert server.ask(sent(site)).status == 200


def test_malformed_after_a_valid_message(site: Site, server: Server) -> None:
    """A message gets its reply, whatever follows it on the connection; then the connection closes."""
    with server.wire() as wire:
        wire.send(sent(site) + b"\x00\x01\x02")
        assert wire.answer().status == 200
        assert wire.answer().status == 400
        assert wire.ended()


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_an_upgrade(site: Site, server: Server, protocol: str) -> None:
    """A request that offers an upgrade gets its reply, and the bytes after it are not read as a request."""
    messages = site.count("messages")
    asked = LIVEZ.replace(b"host", b"connection: upgrade\r\nupgrade: " + protocol.encode() + b"\r\nhost")
    with server.wire() as wire:
        wire.send(asked + sent(site))
        assert wire.answer().status == 200
        assert wire.ended()
    assert site.count("messages") == messages


def test_a_reply_is_taken_before_the_connection_ends(site: Site, server: Server) -> None:
    """A client that continues to send a refused body can still read the reply: the connection is not reset."""
    for _ in range(10):
        refused = post("/redox/lab", b"", content_length=str(30 * MIB), verification_token="wrong" * 8)
        with server.wire() as wire:
            wire.send(refused + 100_000 * b"x")
            assert wire.answer().status == 401
            wire.send(100_000 * b"x")
            assert wire.ended()


def test_a_refused_client_has_less_time(site: Site, server: Server) -> None:
    """After a refusal a silent connection is closed; after an accepted message it is kept."""
    with server.wire(timeout=30) as stranger, server.wire(timeout=30) as feed:
        assert stranger.send(sent(site, verification_token="wrong" * 8)).answer().status == 401
        assert feed.send(sent(site)).answer().status == 200
        assert stranger.ended()
        assert feed.send(sent(site)).answer().status == 200


def test_a_body_that_stops(site: Site, server: Server) -> None:
    """A body that stops arriving gets 400, though the client waits; the audit has the reason."""
    before = site.now()
    with server.wire(timeout=60) as wire:
        body = message()
        answer = wire.send(sent(site, body)[:-5]).answer()
        assert (answer.status, answer.headers["connection"] if len(body) > 64 * 1024 else "close") == (400, "close")
    assert site.audit(before, reason="body_too_slow").outcome == "refused"


def test_an_unread_small_body_has_a_deadline(site: Site, server: Server) -> None:
    """After a refusal the rest of a small body is read and discarded; a client that does not send it is closed."""
    with server.wire(timeout=60) as wire:
        assert wire.send(sent(site, 100 * b"x", verification_token="wrong" * 8)[:-50]).answer().status == 401
        assert wire.ended()


def test_many_slow_bodies_keep_out_no_other(site: Site, server: Server) -> None:
    """1,200 connections with unfinished bodies of strangers do not keep out others."""
    [worker] = server.workers()
    slow = post("/redox/lab", b"", content_length="8000")
    wires = [Wire(server.port, source="127.0.0.3").send(slow) for _ in range(1_200)]
    try:
        until(lambda: len(worker.net_connections("tcp")) > 900)
        for _ in range(20):
            with server.wire(timeout=5) as wire:
                assert wire.send(sent(site)).answer().status == 200
    finally:
        for each in wires:
            each.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            each.socket.close()
