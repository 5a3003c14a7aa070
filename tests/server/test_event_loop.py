"""The event loop: requests in pieces or pipelined, clients that disconnect, and waiting without a thread."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import text

from tests.support.server import Server, Wire, serving
from tests.support.site import Site, message, sent
from tests.support.waiting import until

# Seconds. A request that waits for the ledger gets its reply within five; all others long before.
SOON = 3.0
LIVEZ = b"GET /livez HTTP/1.1\r\nhost: receiver.test\r\n\r\n"


@pytest.fixture(scope="module", autouse=True)
def few_threads(site: Site) -> None:
    """Four request threads."""
    site.environment |= {"RECEIVER_THREADS": "4"}


@contextmanager
def held(site: Site) -> Iterator[None]:
    """Nothing can be recorded while the block runs, because a transaction locks the table."""
    with site.engine.connect() as connection, connection.begin():
        connection.execute(text("LOCK TABLE messages IN ACCESS EXCLUSIVE MODE"))
        yield


def _threads(server: Server) -> int:
    [worker] = server.workers()
    return int(worker.num_threads())


def _recorded(site: Site, body: bytes) -> bool:
    return bool(site.rows("SELECT FROM messages WHERE digest = :digest", digest=site.digest(body)))


def test_waiting_for_the_ledger_takes_no_thread(site: Site, server: Server) -> None:
    """With four request threads, 40 messages wait for the ledger at once, and others are answered meanwhile."""
    assert server.ask(sent(site)).status == 200
    before = _threads(server)
    bodies = [message() for _ in range(40)]
    with held(site):
        wires = [server.wire().send(sent(site, body)) for body in bodies]
        with server.wire(timeout=SOON) as wire:
            for _ in range(20):
                assert wire.send(LIVEZ).answer().status == 200
                assert server.ask(sent(site, verification_token="wrong" * 8)).status == 401
        assert _threads(server) == before
    assert {wire.answer().status for wire in wires} == {200}
    assert all(_recorded(site, body) for body in bodies)
    for wire in wires:
        wire.socket.close()


def test_the_ledger_has_a_deadline(site: Site, server: Server) -> None:
    """A message gets 503 while the database does not respond."""
    with held(site):
        began = time.monotonic()
        assert server.ask(sent(site)).status == 503
        assert time.monotonic() - began < 30
    until(lambda: server.ask(sent(site)).status == 200)


@pytest.mark.parametrize("cut", [1, 20, -4100, -3, -1])
def test_in_pieces(site: Site, server: Server, cut: int) -> None:
    """A request may arrive in two pieces, wherever it is cut; the connection is used again."""
    with server.wire() as wire:
        for _ in range(3):
            body = message()
            whole = sent(site, body)
            wire.send(whole[:cut])
            assert server.ask(LIVEZ).status == 200  # by then the first piece has been read
            assert wire.send(whole[cut:]).answer().status == 200
            assert _recorded(site, body)
            assert wire.send(sent(site)).answer().status == 200


def test_pipelined_requests_are_answered_in_order(site: Site, server: Server) -> None:
    """Requests that arrive together, or before the reply to the last, are answered in their order."""
    bodies = [message() for _ in range(6)]
    whole = [sent(site, body) for body in bodies]
    with server.wire() as wire:
        wire.send(b"".join([*whole[:2], LIVEZ, whole[2], whole[3][:100]]))
        wire.send(whole[3][100:] + whole[4])
        assert [wire.answer().body for _ in range(3)] == [b"", b"", b"ok\n"]
        wire.send(whole[5])
        assert [wire.answer().status for _ in range(4)] == [200] * 4
    assert all(_recorded(site, body) for body in bodies)
    with server.wire() as wire:
        with held(site):
            wire.send(sent(site)).send(LIVEZ)
            assert server.ask(LIVEZ).status == 200
        assert wire.answer().status == 200
        assert wire.answer().body == b"ok\n"


def test_a_client_that_disconnects_loses_no_message(site: Site, server: Server) -> None:
    """A message is kept though its client shut down, closed or reset the connection; the connection is freed."""
    bodies = [message() for _ in range(3)]
    with held(site):
        finished, closed, torn = (server.wire().send(sent(site, body)) for body in bodies)
        with server.wire() as wire:  # when this is answered, the requests before are at work
            assert wire.send(LIVEZ).answer().status == 200
        finished.finish()
        closed.socket.close()
        torn.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        torn.socket.close()
        assert server.ask(LIVEZ).status == 200
    assert finished.answer().status == 200
    assert finished.ended()
    finished.socket.close()
    until(lambda: all(_recorded(site, body) for body in bodies))
    [worker] = server.workers()
    until(lambda: not [each for each in worker.net_connections("tcp") if each.status != "LISTEN" and each.raddr])


def test_a_client_that_reads_no_replies_delays_no_other(site: Site, server: Server) -> None:
    """A client that reads no replies fills its connection; other clients are served."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.settimeout(1.0)
        asked = LIVEZ * 200
        for _ in range(500):  # more than both sides' buffers hold
            try:
                client.sendall(asked)
            except TimeoutError:
                break
            except OSError:  # closed already
                break
        with server.wire(timeout=SOON) as wire:
            for _ in range(5):
                assert wire.send(sent(site)).answer().status == 200


def test_a_refusal_leaves_the_connection(site: Site, server: Server) -> None:
    """After a refused request with a small body the connection is used again, for every destination. A large body is
    not read, and the connection closes.
    """
    wrong = sent(site, verification_token="wrong" * 8)
    for refused in (wrong, sent(site, verification_token=None), wrong.replace(b"/redox/lab", b"/redox/nobody", 1)):
        with server.wire() as wire:
            for _ in range(3):
                answer = wire.send(refused).answer()
                assert (answer.status, answer.headers.get("connection")) == (401, None)
                assert wire.send(sent(site)).answer().status == 200
            wire.send(refused + sent(site))
            assert [wire.answer().status for _ in range(2)] == [401, 200]
        large = refused.partition(b"content-length")[0] + b"content-length: 200000\r\n\r\n" + b"x" * 200_000
        with server.wire() as wire:
            answer = wire.send(large).answer()
            assert (answer.status, answer.headers["connection"]) == (401, "close")
            assert wire.ended()


def test_a_client_asks_to_close(site: Site, server: Server) -> None:
    """With HTTP/1.0 or "Connection: close" the reply is the last on its connection."""
    for start in (sent(site, connection="close"), sent(site).replace(b"HTTP/1.1", b"HTTP/1.0", 1)):
        with server.wire() as wire:
            assert wire.send(start).answer().status == 200
            assert wire.ended()


def test_malformed_http(server: Server) -> None:
    """What is not valid HTTP gets 400, and the connection closes; others are served."""
    for start in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\n\r\n",
        b"POST / HTTP/1.1\r\nA B: c\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    ):
        with server.wire() as wire:
            assert wire.send(start).answer().status == 400
            assert wire.ended()
    assert server.ask(LIVEZ).status == 200


def test_stopped_while_it_waits(site: Site, server: Server) -> None:
    """A worker that stops sends the replies that wait for the ledger, each with "Connection: close"."""
    with serving(site.directory, site.environment) as mine:  # its own, because it ends
        with held(site):
            wire = mine.wire().send(sent(site))
            with mine.wire() as other:
                assert other.send(LIVEZ).answer().status == 200
            mine.process.terminate()
            with pytest.raises(OSError):  # no new connection is accepted
                until(lambda: Wire(mine.port, timeout=SOON).socket.close())
        answer = wire.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        wire.socket.close()
        assert mine.process.wait(60) == 0
