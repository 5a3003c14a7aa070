"""gunicorn as we run it: slow clients, a stop under load, and what it prints."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from hashlib import sha256

import psutil
import pytest

from tests.waiting import until
from tests.web.conftest import Site, message, sent
from tests.web.server import Server, Wire, post, serving

# Less than a client is given that says nothing: who is answered in this time has waited for none of them.
SOON = 5.0


@pytest.fixture(scope="module", autouse=True)
def few_threads(site: Site) -> None:
    """Four request threads."""
    site.environment |= {"RECEIVER_THREADS": "4", "RECEIVER_LOG_LEVEL": "debug", "XDG_RUNTIME_DIR": str(site.directory)}


def test_slow_clients(site: Site, server: Server) -> None:
    """While 200 clients are slow in every way there is, others are answered; the slow ones are hung up on."""
    whole = sent(site)
    head, _, _ = whole.partition(b"\r\n\r\n")
    slow = [
        b"", b"POST /re", head[:60], head, head + b"\r\n\r\n{", post("/redox/lab", b"{", content_length="8000"),
        sent(site, b"", {"content_length": None, "transfer_encoding": "chunked"}) + b"5\r\n{",
        sent(site, verification_token="wrong" * 8),  # answered, and does not take the answer
    ]
    wires = [server.wire(timeout=60).send(start) for start, _ in zip(itertools.cycle(slow), range(200), strict=False)]
    [worker] = server.workers()
    until(lambda: worker.num_threads() > 100)
    began = time.monotonic()
    for _ in range(20):
        with server.wire(timeout=SOON) as wire:
            assert wire.send(sent(site)).answer().status == 200
    assert time.monotonic() - began < 20 * SOON
    for wire in wires:
        _drained(wire)
        wire.socket.close()
    assert server.ask(sent(site)).status == 200


def _drained(wire: Wire) -> None:
    """Read until the other side hangs up."""
    try:
        while wire.socket.recv(4096):
            pass
    except ConnectionResetError:
        pass


def test_trickle(site: Site, server: Server) -> None:
    """A client that sends a byte now and then, so as never to be silent, is hung up on all the same."""
    with server.wire(timeout=60) as wire:
        wire.send(sent(site, b"", content_length="1000"))
        deadline = time.monotonic() + 60
        wire.socket.settimeout(1.0)
        while time.monotonic() < deadline:
            wire.send(b"x")
            try:
                answer = wire.answer()
            except TimeoutError:
                continue
            break
    assert answer.status == 400


def test_threads_are_for_requests_at_work(site: Site, server: Server) -> None:
    """A body that is on its way keeps no request thread: with four, eight may be on their way."""
    body = message()
    whole = sent(site, body)
    wires = [server.wire().send(whole[:-20]) for _ in range(8)]
    assert server.ask(sent(site)).status == 200
    assert [wire.send(whole[-20:]).answer().status for wire in wires] == 8 * [200]
    for wire in wires:
        wire.socket.close()


def test_nothing_is_printed_of_a_request(site: Site, server: Server) -> None:
    """At level debug too: no query, no header, no path of anybody's, no library's text."""
    server.ask(f"GET /redox/lab?challenge=CANARY1&verification-token={site.tokens['lab']} HTTP/1.1\r\n\r\n".encode())
    server.ask(b"GET /CANARY2?CANARY3 HTTP/1.1\r\n\r\n")
    server.ask(b"CANARY4 /CANARY5 HTTP/1.1 x\r\n\r\n")
    server.ask(b"GET / HTTP/1.1\r\nCANARY6\r\n\r\n")
    server.ask(b"GET / HTTP/1.1\r\nCANARY7 : CANARY8\r\n\r\n")
    server.ask(b"GET / HTTP/1.1\r\nContent-Length: CANARY9\r\n\r\n")
    until(lambda: len(server.lines("request.malformed")) >= 4)
    assert "CANARY" not in server.text()
    assert site.tokens["lab"] not in server.text()
    [line] = [line for line in server.lines("request.served") if line["method"] == "GET" and line["status"] == 200
              and line["path"] == "/redox/lab"]
    assert (line["peer"], line["level"]) == ("127.0.0.1", "debug")


def test_no_control_socket(site: Site, server: Server) -> None:
    """gunicorn opens no socket by which it could be told anything."""
    assert server.ask(sent(site)).status == 200
    assert [path for path in site.directory.rglob("*") if path.is_socket()] == []


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGINT])
def test_stopped_under_load(site: Site, order: signal.Signals) -> None:
    """A receiver that is told to stop answers what it has begun and writes what it has heard; every 200 is on disk."""
    accepted: list[bytes] = []
    answered: list[int] = []
    stopping = threading.Event()

    def feed(server: Server) -> None:
        while not stopping.is_set():
            try:
                with server.wire() as wire:
                    for _ in range(20):
                        body = message()
                        answered.append(wire.send(sent(site, body)).answer().status)
                        if answered[-1] == 200:
                            accepted.append(sha256(body).digest())
            except (OSError, EOFError):
                continue

    with serving(site.directory, site.environment | {"RECEIVER_RECEIVERS": "2"}) as server:
        children = server.workers()
        feeds = [threading.Thread(target=feed, args=(server,)) for _ in range(8)]
        for thread in feeds:
            thread.start()
        until(lambda: len(accepted) > 200)
        before = site.now()
        assert server.ask(sent(site, verification_token="wrong" * 8)).status == 401
        status = server.stop(order)
        stopping.set()
        for thread in feeds:
            thread.join()
        assert status == 0
        assert not any(child.is_running() for child in children)
        assert [line for line in server.lines() if line["level"] == "error"] == []
    recorded = {bytes(row[0]) for row in site.rows("SELECT sha256 FROM messages")}
    assert set(accepted) <= recorded
    assert set(answered) <= {200, 503}
    if order == signal.SIGTERM:
        assert site.audit(before, reason="token_wrong").outcome == "refused"


def test_worker_that_dies_is_replaced(site: Site, server: Server) -> None:
    """A worker that is killed is replaced, and the receiver answers on."""
    [worker] = server.workers()
    worker.kill()
    worker.wait(10)
    until(lambda: _answers(server, site))
    assert psutil.pid_exists(server.process.pid)


def _answers(server: Server, site: Site) -> bool:
    try:
        return server.ask(sent(site)).status == 200
    except (OSError, EOFError):
        return False


@pytest.mark.parametrize("arguments", [("-k", "gthread"), ("-k", "sync", "--access-logfile", "-")])
def test_plain_gunicorn(site: Site, arguments: tuple[str, ...]) -> None:
    """`gunicorn wsgi:application` works without our configuration, and prints no query string either."""
    arguments = (*arguments, "--no-control-socket", "wsgi:application")
    with serving(site.directory, site.environment, arguments=arguments) as server:
        assert server.ask(sent(site)).status == 200
        assert server.ask(sent(site, verification_token=None)).status == 401
        with server.wire() as wire:
            chunked = sent(site, b"", {"content_length": None, "transfer_encoding": "chunked"})
            assert wire.send(chunked + b"zz\r\n").answer().status == 400
        with server.wire() as wire:
            assert wire.send(sent(site, b"{}", content_length="10")).finish().answer().status == 400
        server.ask(f"GET /redox/lab?challenge=CANARY&verification-token={site.tokens['lab']} HTTP/1.1\r\n\r\n".encode())
        assert "CANARY" not in server.text()
        assert site.tokens["lab"] not in server.text()
