"""The framing of HTTP, on raw sockets against a real gunicorn: malformed, oversized, chunked and pipelined requests."""

from __future__ import annotations

import re
import socket
import struct
import threading
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from tests.support.server import Server, post
from tests.support.site import Site, message, sent
from tests.support.waiting import until

MIB = 1024 * 1024
CHUNKED: dict[str, str | None] = {"content_length": None, "transfer_encoding": "chunked"}


@pytest.fixture(scope="module", autouse=True)
def few_send_there(site: Site) -> None:
    """Destinations to which one test sends in one server mode."""
    for name in ("bare-flask", "bare-asgi", "chunks-flask", "chunks-asgi"):
        site.add(name)
    site.add("signed", require=["hmac"])
    site.registration.add_credential(
        "signed", datetime.now(UTC), "hmac", {}, b"a made-up secret of some length", label=None, expires_at=None
    )


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@pytest.mark.parametrize(
    ("name", "change", "status"),
    [
        ("two that differ", lambda raw: raw.replace(b"content-length", b"content-length: 3\r\ncontent-length"), 400),
        ("two lengths that agree", lambda raw: re.sub(rb"(content-length: \d+\r\n)", rb"\1\1", raw), 400),
        ("a list of lengths", lambda raw: re.sub(rb"(content-length: )(\d+)", rb"\1\2, \2", raw), 400),
        ("a negative length", lambda raw: raw.replace(b"content-length: ", b"content-length: -"), 400),
        ("a length with a sign", lambda raw: raw.replace(b"content-length: ", b"content-length: +"), 400),
        ("both", lambda raw: raw.replace(b"content-length", b"transfer-encoding: chunked\r\ncontent-length"), 400),
        (
            "an unknown coding",
            lambda raw: raw.replace(b"content-length", b"transfer-encoding: xchunked\r\nx-length"),
            501,
        ),
        (
            "compressed chunks",
            lambda raw: raw.replace(b"content-length", b"transfer-encoding: gzip, chunked\r\nx-length"),
            501,
        ),
        (
            "two codings",
            lambda raw: raw.replace(
                b"content-length", b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\nx-length"
            ),
            501,
        ),
        ("two hosts", lambda raw: raw.replace(b"host: ", b"host: other.test\r\nhost: "), 400),
        (
            "a head of 70 KB",
            lambda raw: raw.replace(
                b"host: ", b"".join(b"x-%d: %s\r\n" % (n, 7000 * b"y") for n in range(10)) + b"host: "
            ),
            431,
        ),
        ("HTTP/0.9", lambda raw: raw.replace(b" HTTP/1.1", b"", 1), 400),
        ("HTTP/2", lambda raw: raw.replace(b"HTTP/1.1", b"HTTP/2.0", 1), 400),
        ("a NUL in a header", lambda raw: raw.replace(b"host: ", b"x-a: b\x00c\r\nhost: "), 400),
        ("a CR in a header", lambda raw: raw.replace(b"host: ", b"x-a: b\rc\r\nhost: "), 400),
        ("a folded header", lambda raw: raw.replace(b"host: ", b"x-a: b\r\n c\r\nhost: "), 400),
        ("a bare LF", lambda raw: raw.replace(b"host: receiver.test\r\n", b"host: receiver.test\n"), 400),
        ("a header without a name", lambda raw: raw.replace(b"host: ", b": x\r\nhost: "), 400),
        ("a space before the colon", lambda raw: raw.replace(b"host: ", b"host : "), 400),
        (
            "110 headers",
            lambda raw: raw.replace(b"host: ", b"".join(b"x-%d: y\r\n" % n for n in range(110)) + b"host: "),
            431,
        ),
        ("a header of 9 KB", lambda raw: raw.replace(b"host: ", b"x-a: " + 9 * 1024 * b"y" + b"\r\nhost: "), 431),
        ("a target of 9 KB", lambda raw: raw.replace(b" HTTP/1.1", b"?" + 9 * 1024 * b"y" + b" HTTP/1.1", 1), 414),
        ("an expectation", lambda raw: raw.replace(b"host: ", b"expect: foo\r\nhost: "), 417),
        ("HTTP/3", lambda raw: raw.replace(b"HTTP/1.1", b"HTTP/3.0", 1), 400),
        ("a method in lower case", lambda raw: raw.replace(b"POST", b"post", 1), 400),
    ],
)
def test_malformed(site: Site, server: Server, name: str, change: Callable[[bytes], bytes], status: int) -> None:
    """What is not valid HTTP gets a short reply and the connection closes. Nothing is stored, and nothing is quoted."""
    before = site.count("messages")
    whole = sent(site)
    assert change(whole) != whole, name
    with server.wire() as wire:
        answer = wire.send(change(whole)).answer()
        assert wire.ended()
    assert answer.status == status
    assert len(answer.body) < 40
    assert "server" not in answer.headers
    assert site.count("messages") == before
    assert site.tokens["lab"] not in server.text()


def test_an_escape_in_a_header_is_data(site: Site, server: Server) -> None:
    """A control character in a header value does not reach log or terminal."""
    answer = server.ask(sent(site).replace(b"host: ", b"x-a: \x1b[31mred\r\nhost: "))
    assert answer.status in (200, 400)
    assert "\x1b" not in server.text()


def test_announced_beyond_the_cap(site: Site, server: Server) -> None:
    """A body announced beyond the limit gets 413 before it is sent; the connection closes. The audit says why."""
    before = site.now()
    with server.wire() as wire:
        answer = wire.send(sent(site, b"", content_length=str(40 * MIB + 1))).answer()
        assert wire.ended()
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert site.audit(before, reason="body_too_large").peer == "127.0.0.1"


def test_announced_beyond_the_cap_without_a_token(site: Site, server: Server) -> None:
    """Without a credential it is 413 too: the limit is not secret."""
    answer = server.ask(sent(site, b"", content_length=str(40 * MIB + 1), verification_token=None))
    assert answer.status == 413


def test_chunks_beyond_the_cap(site: Site, server: Server) -> None:
    """A chunked body gets 413 as soon as it exceeds the limit; no part of it is stored."""
    before, messages = site.now(), site.count("messages")
    with server.wire() as wire:
        wire.send(sent(site, b"", CHUNKED))
        piece = chunk(MIB * b"x")
        for _ in range(41):
            wire.send(piece)
        assert wire.answer().status == 413
    assert site.audit(before, reason="body_too_large").destination == "lab"
    assert site.count("messages") == messages


def test_chunks(site: Site, server: Server) -> None:
    """A chunked body is the same message as the same bytes with a length."""
    body = message()
    with server.wire() as wire:
        wire.send(sent(site, b"", CHUNKED) + chunk(body[:7]) + chunk(body[7:]) + b"0\r\n\r\n")
        assert wire.answer().status == 200
        assert wire.send(sent(site, body)).answer().status == 200
    [again, first] = site.rows(
        "SELECT outcome, message_uuid FROM audit_events WHERE action = 'message.receive' ORDER BY id DESC LIMIT 2"
    )
    assert (first.outcome, again.outcome) == ("unhandled", "duplicate")
    assert first.message_uuid == again.message_uuid


def test_short_body(site: Site, server: Server) -> None:
    """A body that ends before its announced length gets 400, whatever it holds."""
    before, messages = site.now(), site.count("messages")
    with server.wire() as wire:
        answer = wire.send(sent(site, b"{}", content_length="10")).finish().answer()
    assert answer.status == 400
    assert site.audit(before, reason="body_incomplete").outcome == "refused"
    assert site.count("messages") == messages


@pytest.mark.parametrize(
    "rest",
    [b"zz\r\n{}\r\n0\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n", b"0x2\r\n{}\r\n0\r\n\r\n", b"2\r\n{}xx0\r\n\r\n", b"\r\n"],
)
def test_bad_chunks(site: Site, server: Server, rest: bytes) -> None:
    """Malformed chunks get 400, not 503."""
    messages = site.count("messages")
    with server.wire() as wire:
        answer = wire.send(sent(site, b"", CHUNKED) + rest).answer()
        assert wire.ended()
    assert answer.status == 400
    assert site.count("messages") == messages


@pytest.mark.parametrize("rest", [b"", b"5", b"5\r\n{", b"2\r\n{}\r\n", b"2\r\n{}\r\n0\r\n"])
def test_unfinished_chunks(site: Site, server: Server, rest: bytes) -> None:
    """A chunked body without its last chunk gets 400."""
    messages = site.count("messages")
    with server.wire() as wire:
        answer = wire.send(sent(site, b"", CHUNKED) + rest).finish().answer()
    assert answer.status == 400
    assert site.count("messages") == messages


def test_bad_chunks_in_the_audit(site: Site, server: Server, server_mode: str) -> None:
    """The audit has a row for malformed chunks. Its own destination, because many rows of one are summed up."""
    before, name = site.now(), f"chunks-{server_mode}"
    with server.wire() as wire:
        wire.send(sent(site, b"", CHUNKED, to=name) + b"zz\r\n{}\r\n0\r\n\r\n").answer()
    row = site.audit(before, reason="body_malformed")
    assert (row.action, row.outcome, row.destination) == ("message.refuse", "refused", name)


def test_a_token_in_a_trailer(site: Site, server: Server) -> None:
    """A token in a trailer, after the body, proves nothing; before the body it would."""
    body, messages, token = message(), site.count("messages"), site.tokens["lab"].encode()
    start = sent(site, b"", CHUNKED, verification_token=None) + chunk(body) + b"0\r\n"
    with server.wire() as wire:
        assert wire.send(start + b"verification-token: " + token + b"\r\n\r\n").answer().status == 401
    assert site.count("messages") == messages
    assert server.ask(sent(site, body)).status == 200


def test_pipelined(site: Site, server: Server) -> None:
    """A second request on the same connection is judged by itself, even in one packet with the first."""
    with server.wire() as wire:
        wire.send(sent(site) + sent(site, verification_token="wrong" * 8))
        assert [wire.answer().status, wire.answer().status] == [200, 401]


def test_smuggled(site: Site, server: Server) -> None:
    """Bytes after a refused request on its connection are not read as a request."""
    messages = site.count("messages")
    with server.wire() as wire:
        inner = sent(site)
        assert wire.send(sent(site, inner, verification_token="wrong" * 8)).answer().status == 401
        assert wire.ended()
    assert site.count("messages") == messages


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "PROPFIND"])
def test_other_methods(site: Site, server: Server, method: str) -> None:
    """All methods but POST and GET get 405."""
    with server.wire() as wire:
        answer = wire.send(
            sent(site).replace(b"POST", method.encode(), 1)
            if method != "HEAD"
            else b"HEAD /redox/lab HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        head = until(lambda: answer.socket.recv(4096))
    assert head.startswith(b"HTTP/1.1 405 ")
    assert b"allow: get, post" in head.lower()


@pytest.mark.parametrize(
    "target",
    [
        "/redox/lab/",
        "//redox/lab",
        "/redox//lab",
        "///redox///lab///",
        "/redox/%6cab",
        "http://elsewhere.test/redox/lab",
        "https://elsewhere.test//redox/lab?x=y",
    ],
)
def test_spellings_of_the_path(site: Site, server: Server, target: str) -> None:
    """Every spelling of a path leads to the same authentication."""
    with server.wire() as wire:
        assert wire.send(sent(site).replace(b"/redox/lab", target.encode(), 1)).answer().status == 200
        wrong = sent(site, verification_token=None).replace(b"/redox/lab", target.encode(), 1)
        assert wire.send(wrong).answer().status == 401


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/redox",
        "/redox/",
        "/redox/lab/x",
        "/readyz",
        "/metrics",
        "/redox/../redox/lab",
        "/favicon.ico",
        "/static/x",
        "/%2e%2e/etc/passwd",
        "/redox/lab%2fx",
        "/" + 900 * "a/",
    ],
)
def test_other_paths(site: Site, server: Server, target: str) -> None:
    """All other paths of this listener are 404, even with the right token."""
    answer = server.ask(sent(site).replace(b"/redox/lab", target.encode(), 1))
    assert (answer.status, answer.body) == (404, b"not found\n")


@pytest.mark.parametrize(
    "hello",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x80\x2e\x01\x00\x02",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"\x00" * 100,
        b"\r\n\r\n",
    ],
)
def test_other_protocols(server: Server, hello: bytes) -> None:
    """A client with another protocol gets 400 or no reply, and the connection closes."""
    with server.wire() as wire:
        wire.send(hello)
        head = b""
        while data := _received(wire.socket):
            head += data
    assert not head or head.startswith(b"HTTP/1.1 400 ")


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except ConnectionResetError:
        return b""


def test_every_reply_has_our_header(site: Site, server: Server) -> None:
    """Every reply forbids caching and type sniffing, sets no cookie, and names no software version."""
    for raw in (sent(site), sent(site, verification_token=None), sent(site).replace(b"/redox/lab", b"/x", 1)):
        answer = server.ask(raw)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["server"] == "redox-receiver"
        assert "set-cookie" not in answer.headers


def test_continue(site: Site, server: Server) -> None:
    """A client with "Expect: 100-continue" gets 100 if its head is accepted, and the refusal at once if not."""
    body = message()
    head, _, _ = sent(site, body, expect="100-continue").partition(b"{")
    with server.wire() as wire:
        assert wire.send(head).answer().status == 100
        assert wire.send(body).answer().status == 200
    with server.wire() as wire:
        refused = head.replace(site.tokens["lab"].encode(), b"wrong" * 8)
        assert wire.send(refused).answer().status == 401


def test_a_connection_is_used_again(site: Site, server: Server) -> None:
    """A connection serves one message after another."""
    with server.wire() as wire:
        assert [wire.send(sent(site)).answer().status for _ in range(5)] == 5 * [200]
        assert wire.send(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").answer().body == b"ok\n"


def test_large_body(site: Site, server: Server) -> None:
    """The largest message that Redox sends is accepted byte for byte, in bounded memory."""
    body = message()
    body = body[:-1] + b', "Data": "' + (40 * MIB - len(body) - 12) * b"x" + b'"}'
    assert len(body) == 40 * MIB
    [worker] = server.workers()
    assert server.ask(sent(site)).status == 200
    resident = worker.memory_info().rss
    highest = [resident]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest.append(worker.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    assert server.ask(sent(site, body)).status == 200
    done.set()
    watching.join()
    [(size,)] = site.rows("SELECT size FROM messages ORDER BY id DESC LIMIT 1")
    assert size == len(body)
    assert max(highest) - resident < 4 * len(body)


def test_large_bodies_with_a_wrong_token(site: Site, server: Server) -> None:
    """Four bodies of 30 MB with a wrong token take no memory and delay no other request."""
    [worker] = server.workers()
    resident = worker.memory_info().rss
    wires = [server.wire() for _ in range(4)]
    flood = [
        threading.Thread(target=wire.send, args=(sent(site, 30 * MIB * b"x", verification_token="wrong" * 8),))
        for wire in wires
    ]
    for thread in flood:
        thread.start()
    assert [server.ask(sent(site)).status for _ in range(10)] == 10 * [200]
    for thread in flood:
        thread.join()
    for wire in wires:
        wire.socket.close()
    assert worker.memory_info().rss - resident < 30 * MIB


def test_unauthenticated_bodies_take_half_of_the_memory(site: Site, server: Server) -> None:
    """Large bodies that only a signature can authenticate fill half of the budget, and the next gets 503. Bodies that
    the head authenticates still fit. Afterwards all do.
    """
    size, signature = 39 * MIB, b64encode(32 * b"\0").decode()
    stranger = sent(site, size * b" ", to="signed", verification_token=None, redox_signature=signature)
    held = [server.wire(timeout=60) for _ in range(3)]
    for start in range(0, len(stranger) - 1, MIB):  # in turn, so that none is silent for long
        for wire in held:
            wire.send(stranger[start : min(start + MIB, len(stranger) - 1)])
    with server.wire(timeout=60) as late:
        refused = late.send(stranger[:-1]).answer()
    assert (refused.status, refused.headers["retry-after"]) == (503, "5")
    assert server.ask(sent(site, message(Extra=size * "x"))).status == 200
    small = sent(site, b"{}", to="signed", verification_token=None, redox_signature=signature)
    assert server.ask(small).status == 401
    assert [wire.send(b" ").answer().status for wire in held] == 3 * [401]
    for wire in held:
        wire.socket.close()
    with server.wire(timeout=60) as wire:
        assert wire.send(stranger).answer().status == 401
    assert [line["reason"] for line in server.lines("request.unavailable")] == ["bodies_fill_memory"]


def test_a_client_that_resets_its_connection(site: Site, server: Server) -> None:
    """A message that arrived whole is kept, though its client is gone; an incomplete one is not."""
    whole, part = message(), message()
    for data in (sent(site, whole), sent(site, part)[:-1]):
        with server.wire() as wire:
            wire.send(data)
            # Close with a reset.
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    kept = "SELECT FROM messages WHERE digest = :digest"
    until(lambda: site.rows(kept, digest=site.digest(whole)))
    assert server.ask(sent(site)).status == 200
    assert not site.rows(kept, digest=site.digest(part))


def test_unproved_body(site: Site, server: Server, server_mode: str) -> None:
    """Without a credential in the head, no more of the body is read than a handshake has."""
    with server.wire() as wire:
        answer = wire.send(post(f"/redox/bare-{server_mode}", b"", content_length=str(30 * MIB))).answer()
        assert wire.ended()
    assert answer.status == 401
    with server.wire() as wire:
        wire.send(post(f"/redox/bare-{server_mode}", b"", **CHUNKED) + chunk(8 * 1024 * b"x") + chunk(b"x"))
        assert wire.answer().status == 401
    refusals = "SELECT reason FROM audit_events WHERE destination = :name AND action = 'message.refuse'"
    until(lambda: len(site.rows(refusals, name=f"bare-{server_mode}")) == 2)
    assert set(site.rows(refusals, name=f"bare-{server_mode}")) == {("credential_missing",)}
