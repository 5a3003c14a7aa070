"""The TCP proxy in front of PostgreSQL fails in the way that it is asked to, and in no other."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psycopg
import pytest
from sqlalchemy import make_url

from tests.support.tcp_proxy import TcpProxy, connect_to, tcp_proxy


@pytest.fixture
def proxy(database_url: str) -> Iterator[TcpProxy]:
    """A proxy in front of the tests' PostgreSQL."""
    with tcp_proxy(partial(connect_to, database_url)) as made:
        yield made


@pytest.fixture
def through(proxy: TcpProxy, database_url: str) -> Iterator[psycopg.Connection]:
    """A connection through it, each statement a transaction of its own."""
    address = make_url(database_url)
    with psycopg.connect(
        host="127.0.0.1",
        port=proxy.port,
        user=address.username,
        dbname=address.database,
        autocommit=True,
        connect_timeout=10,
    ) as connection:
        yield connection


@pytest.fixture
def direct(database_url: str) -> Iterator[psycopg.Connection]:
    """A connection that does not use the proxy."""
    url = make_url(database_url).set(drivername="postgresql").render_as_string()
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def test_forwards_both_ways(through: psycopg.Connection) -> None:
    """Large requests and large answers arrive unchanged."""
    assert through.execute("SELECT repeat('x', 300000) || %s", ["y" * 300000]).fetchone() == (
        "x" * 300000 + "y" * 300000,
    )


@pytest.mark.parametrize("reset", [False, True])
def test_cuts(proxy: TcpProxy, through: psycopg.Connection, reset: bool) -> None:
    """Both sides see a cut connection as closed; with `reset` the client receives RST."""
    client = socket.socket(fileno=socket.dup(through.fileno()))
    assert proxy.cut(reset=reset) == 1
    client.settimeout(10)
    if reset:
        with client, pytest.raises(ConnectionResetError):
            client.recv(1)
    else:
        with client:
            assert client.recv(1) == b""
    with pytest.raises(psycopg.OperationalError):
        through.execute("SELECT 1")


def test_freezes(proxy: TcpProxy, through: psycopg.Connection, direct: psycopg.Connection) -> None:
    """While the proxy is frozen nothing arrives. What was sent meanwhile arrives after it thaws."""
    direct.execute("CREATE TABLE arrived (n int)")
    proxy.freeze()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(through.execute, "INSERT INTO arrived VALUES (1)")
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        assert direct.execute("SELECT count(*) FROM arrived").fetchone() == (0,)
        proxy.thaw()
        waiting.result(30)
    assert direct.execute("SELECT count(*) FROM arrived").fetchone() == (1,)


def test_holds_an_answer(proxy: TcpProxy, through: psycopg.Connection, direct: psycopg.Connection) -> None:
    """A statement whose answer is held is committed, but its client waits. If the connection is cut, it never knows."""
    direct.execute("CREATE TABLE kept (what text)")
    held = proxy.hold_answer(b"the one")
    through.execute("INSERT INTO kept VALUES (%s)", ["another"])
    assert not held.committed.is_set()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(through.execute, "INSERT INTO kept VALUES (%s)", ["this is the one"])
        assert held.committed.wait(30)
        assert direct.execute("SELECT what FROM kept ORDER BY what").fetchall() == [("another",), ("this is the one",)]
        assert not waiting.done()
        proxy.cut()
        with pytest.raises(psycopg.OperationalError):
            waiting.result(30)


def test_releases_an_answer(proxy: TcpProxy, through: psycopg.Connection) -> None:
    """A held answer arrives complete after its release."""
    held = proxy.hold_answer(b"let me go")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(through.execute, "SELECT %s || repeat('x', 300000)", ["let me go"])
        assert held.committed.wait(30)
        held.release()
        assert waiting.result(30).fetchone() == ("let me go" + "x" * 300000,)
