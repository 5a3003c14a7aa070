"""gunicorn's worker: slow clients, a stop under load, and what it prints."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.support.server import OURS, Server, Wire, post, serving
from tests.support.site import Site, message, sent
from tests.support.waiting import until

# Seconds. Shorter than the deadline of a silent client: a reply within it has waited for no slow client.
SOON = 5.0


@pytest.fixture(scope="module", autouse=True)
def few_threads(site: Site) -> None:
    """Four request threads."""
    site.environment |= {"RECEIVER_THREADS": "4", "RECEIVER_LOG_LEVEL": "debug", "XDG_RUNTIME_DIR": str(site.directory)}


def test_slow_clients(site: Site, server: Server) -> None:
    """While 200 clients are slow in every way, others are answered; the slow connections are closed."""
    whole = sent(site)
    head, _, _ = whole.partition(b"\r\n\r\n")
    slow = [
        b"",
        b"POST /re",
        head[:60],
        head,
        head + b"\r\n\r\n{",
        post("/redox/lab", b"{", content_length="8000"),
        sent(site, b"", {"content_length": None, "transfer_encoding": "chunked"}) + b"5\r\n{",
        sent(site, verification_token="wrong" * 8),  # answered, and does not read the reply
    ]
    wires = [server.wire(timeout=60).send(start) for start, _ in zip(itertools.cycle(slow), range(200), strict=False)]
    [worker] = server.workers()
    until(lambda: len(worker.net_connections("tcp")) > 200)  # all have been accepted
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
    """Read until the server closes."""
    try:
        while wire.socket.recv(4096):
            pass
    except ConnectionResetError:
        pass


def test_trickle(site: Site, server: Server) -> None:
    """A client that sends a byte a second, and so is never silent, still misses the minimum pace: 400."""
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
    """A body that is arriving takes no request thread: with four threads, eight bodies can arrive."""
    body = message()
    whole = sent(site, body)
    wires = [server.wire().send(whole[:-20]) for _ in range(8)]
    assert server.ask(sent(site)).status == 200
    assert [wire.send(whole[-20:]).answer().status for wire in wires] == 8 * [200]
    for wire in wires:
        wire.socket.close()


def test_more_connections_than_the_limit(site: Site) -> None:
    """A slow or idle connection is closed at once for a new one: with a limit of eight, twenty more can connect."""
    limited = (*OURS, "--worker-connections", "8")
    with serving(site.directory, site.environment | {"RECEIVER_SERVER_MODE": "asgi"}, arguments=limited) as server:
        starts = [b"", b"POST /re", sent(site)[:-5], sent(site)]
        wires = [server.wire(timeout=60).send(start) for start in 5 * starts]
        with server.wire(timeout=60) as wire:
            for _ in range(3):
                assert wire.send(sent(site)).answer().status == 200
        for each in wires:
            each.socket.close()


def test_nothing_is_printed_of_a_request(site: Site, server: Server) -> None:
    """Not even at level debug does a line show a query, a header, a client's path, or a library's text."""
    server.ask(f"GET /redox/lab?challenge=CANARY1&verification-token={site.tokens['lab']} HTTP/1.1\r\n\r\n".encode())
    server.ask(b"GET /CANARY2?CANARY3 HTTP/1.1\r\n\r\n")
    server.ask(b"CANARY4 /CANARY5 HTTP/1.1 x\r\n\r\n")
    server.ask(b"GET / HTTP/1.1\r\nCANARY6\r\n\r\n")
    server.ask(b"GET / HTTP/1.1\r\nCANARY7 : CANARY8\r\n\r\n")
    server.ask(b"GET / HTTP/1.1\r\nContent-Length: CANARY9\r\n\r\n")
    until(lambda: len(server.lines("request.malformed")) >= 4)
    assert "CANARY" not in server.text()
    assert site.tokens["lab"] not in server.text()
    [line] = [
        line
        for line in server.lines("request.served")
        if line["method"] == "GET" and line["status"] == 200 and line["path"] == "/redox/lab"
    ]
    assert (line["peer"], line["level"]) == ("127.0.0.1", "debug")


def test_no_control_socket(site: Site, server: Server) -> None:
    """gunicorn opens no control socket."""
    assert server.ask(sent(site)).status == 200
    assert [path for path in site.directory.rglob("*") if path.is_socket()] == []


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGINT])
def test_stopped_under_load(site: Site, server_mode: str, order: signal.Signals) -> None:
    """A receiver that stops finishes its requests and writes its audit rows; every message answered 200 is stored."""
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
                            accepted.append(site.digest(body))
            except (OSError, EOFError):
                continue

    two = {"RECEIVER_RECEIVERS": "2", "RECEIVER_SERVER_MODE": server_mode}
    with serving(site.directory, site.environment | two) as server:
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
    recorded = {bytes(row[0]) for row in site.rows("SELECT digest FROM messages")}
    assert set(accepted) <= recorded
    assert set(answered) <= {200, 503}
    if order == signal.SIGTERM:
        assert site.audit(before, reason="token_wrong").outcome == "refused"


def test_connected_clients_are_answered_at_a_stop(site: Site) -> None:
    """Also clients whose connections wait to be accepted."""
    with serving(site.directory, site.environment) as server:
        [worker] = server.workers()
        worker.suspend()
        wires = [server.wire().send(sent(site)) for _ in range(5)]
        server.process.send_signal(signal.SIGTERM)
        until(lambda: _pending(worker.pid, signal.SIGTERM))
        worker.resume()
        assert [wire.answer().status for wire in wires] == [200] * 5
        for wire in wires:
            wire.socket.close()
        assert server.process.wait(60) == 0


def _pending(pid: int, number: signal.Signals) -> bool:
    """Whether the signal waits for that process."""
    masks = [
        int(line.split()[1], 16)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith(("SigPnd", "ShdPnd"))
    ]
    return any(mask >> (number - 1) & 1 for mask in masks)


def test_worker_that_dies_is_replaced(site: Site, server: Server) -> None:
    """A worker that is killed is replaced, and the receiver keeps serving."""
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


@pytest.mark.parametrize(
    "arguments",
    [
        ("-k", "gthread", "wsgi:application"),
        ("-k", "sync", "--access-logfile", "-", "wsgi:application"),
        ("-k", "uvicorn_worker.UvicornWorker", "--access-logfile", "-", "receiver.asgi:application"),
        ("-k", "receiver.server.worker.Worker", "--access-logfile", "-", "receiver.asgi:application"),
    ],
)
def test_plain_gunicorn(site: Site, arguments: tuple[str, ...]) -> None:
    """Both applications work under gunicorn without our configuration, and print no query string either."""
    arguments = ("--no-control-socket", *arguments)
    with serving(site.directory, site.environment, arguments=arguments) as server:
        assert server.ask(sent(site)).status == 200
        assert server.ask(sent(site, verification_token=None)).status == 401
        with server.wire() as wire:
            chunked = sent(site, b"", {"content_length": None, "transfer_encoding": "chunked"})
            assert wire.send(chunked + b"zz\r\n").answer().status == 400
        with server.wire() as wire:
            wire.send(sent(site, b"{}", content_length="10")).finish()
            # uvicorn's own worker closes the connection when the client shuts down its side.
            assert wire.ended() if "uvicorn_worker.UvicornWorker" in arguments else wire.answer().status == 400
        server.ask(f"GET /redox/lab?challenge=CANARY&verification-token={site.tokens['lab']} HTTP/1.1\r\n\r\n".encode())
        assert "CANARY" not in server.text()
        assert site.tokens["lab"] not in server.text()


def test_reload_with_broken_settings(site: Site) -> None:
    """SIGHUP with invalid settings or keyring changes nothing: the same workers serve, and the log says what is wrong.
    After the fix, SIGHUP replaces the workers."""
    (site.directory / ".env").write_text("")
    with serving(site.directory, site.environment) as server:
        [worker] = server.workers()
        errors: list[str] = []
        for name, broken in ((".env", "RECEIVER_MAX_BODY=little"), ("keyring.json", "")):
            path = site.directory / name
            sound = path.read_text()
            path.write_text(broken)
            server.process.send_signal(signal.SIGHUP)
            errors.append(until(partial(_not_reloaded, server, len(errors))))
            path.write_text(sound)
            assert server.ask(sent(site)).status == 200
        assert server.workers() == [worker]
        assert ["RECEIVER_MAX_BODY" in each for each in errors] == [True, False]
        server.process.send_signal(signal.SIGHUP)
        until(lambda: worker not in server.workers() and _answers(server, site))


def _not_reloaded(server: Server, before: int) -> str | None:
    """The error of the next SIGHUP that changed nothing, after that many others."""
    lines = server.lines("receiver.not_reloaded")[before:]
    return lines[0]["error"] if lines else None
