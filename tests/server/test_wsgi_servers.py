"""wsgi.py under a WSGI server that is not gunicorn: waitress, each request in a thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.server import Server, post, serving
from tests.support.site import Site, message, sent

MIB = 1024 * 1024
CHUNKED: dict[str, str | None] = {"content_length": None, "transfer_encoding": "chunked"}
PROGRAM = """
import socket, sys, waitress, wsgi
waitress.serve(wsgi.application, sockets=[socket.socket(fileno=int(sys.argv[1]))], _quiet=True)
"""


def _waitress(_arguments: Sequence[str], descriptor: int) -> Sequence[str]:
    return ["-c", PROGRAM, str(descriptor)]


@pytest.fixture(scope="module")
def waitress(site: Site) -> Iterator[Server]:
    """waitress at work on `site`."""
    with serving(site.directory, site.environment, program=_waitress) as server:
        yield server


def _recorded(site: Site, body: bytes) -> bool:
    return bool(site.rows("SELECT FROM messages WHERE digest = :digest", digest=site.digest(body)))


def test_messages(site: Site, waitress: Server) -> None:
    """Messages at the same time, chunked or with a length, small or large: each gets 200 and is recorded."""
    bodies = [message() for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: waitress.ask(sent(site, body)), bodies))
    assert [answer.status for answer in answers] == [200] * len(bodies)
    chunked, large = message(), message(Extra=2 * MIB * "x")
    start = sent(site, b"", CHUNKED)
    assert waitress.ask(start + b"%x\r\n%b\r\n0\r\n\r\n" % (len(chunked), chunked)).status == 200
    assert waitress.ask(sent(site, large)).status == 200
    assert all(_recorded(site, body) for body in [*bodies, chunked, large])


def test_refusals(site: Site, waitress: Server) -> None:
    """Refusals have the same statuses here, also those whose reply would close the connection."""
    assert waitress.ask(sent(site, verification_token=None)).status == 401
    assert waitress.ask(sent(site, 100_000 * b"x", verification_token="wrong" * 8)).status == 401
    assert waitress.ask(sent(site, 41 * MIB * b"x")).status == 413
    assert waitress.ask(post("/nowhere", 100_000 * b"x")).status == 404
    assert waitress.ask(sent(site).replace(b"POST", b"PUT", 1)).status == 405


def test_handshake(site: Site, waitress: Server) -> None:
    """A handshake by GET gets its challenge, and nothing prints its query."""
    token = site.tokens["lab"]
    start = f"GET /redox/lab?challenge=CANARY&verification-token={token} HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = waitress.ask(start.encode())
    assert (answer.status, answer.body) == (200, b"CANARY")
    assert "CANARY" not in waitress.text()
    assert token not in waitress.text()
