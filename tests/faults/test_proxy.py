"""The TCP proxy in front of PostgreSQL, and each of its faults."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from tests.faults.proxy import Proxy, proxy


@pytest.fixture
def before(database_url: str) -> Iterator[Proxy]:
    """A proxy in front of the tests' PostgreSQL."""
    address = make_url(database_url)
    path = Path(str(address.query["host"])) / f".s.PGSQL.{address.query['port']}"

    def connect() -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(path))
        return made

    with proxy(connect) as made:
        yield made


@pytest.fixture
def through(before: Proxy, database_url: str) -> Iterator[psycopg.Connection]:
    """A connection through the proxy, in autocommit mode."""
    address = make_url(database_url)
    with psycopg.connect(
        host="127.0.0.1",
        port=before.port,
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


def test_forwards(through: psycopg.Connection) -> None:
    """The proxy forwards more than one piece in both directions."""
    assert through.execute("SELECT repeat('x', 300000) || %s", ["y" * 300000]).fetchone() == (
        "x" * 300000 + "y" * 300000,
    )


@pytest.mark.parametrize("reset", [False, True])
def test_cuts(before: Proxy, through: psycopg.Connection, reset: bool) -> None:
    """A cut ends the connection for both sides, with a FIN or a reset."""
    client = socket.socket(fileno=socket.dup(through.fileno()))
    assert before.cut(reset=reset) == 1
    client.settimeout(10)
    if reset:
        with client, pytest.raises(ConnectionResetError):
            client.recv(1)
    else:
        with client:
            assert client.recv(1) == b""
    with pytest.raises(psycopg.OperationalError):
        through.execute("SELECT 1")


def test_freezes(before: Proxy, through: psycopg.Connection, direct: psycopg.Connection) -> None:
    """While the proxy is frozen nothing arrives. What was under way arrives after it thaws."""
    direct.execute("CREATE TABLE arrived (n int)")
    before.freeze()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(through.execute, "INSERT INTO arrived VALUES (1)")
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        assert direct.execute("SELECT count(*) FROM arrived").fetchone() == (0,)
        before.thaw()
        waiting.result(30)
    assert direct.execute("SELECT count(*) FROM arrived").fetchone() == (1,)


def test_holds_an_answer(before: Proxy, through: psycopg.Connection, direct: psycopg.Connection) -> None:
    """A statement whose reply is held is committed. After a cut, its client gets no reply."""
    direct.execute("CREATE TABLE kept (what text)")
    held = before.hold_answer(b"the one")
    through.execute("INSERT INTO kept VALUES (%s)", ["another"])
    assert not held.committed.is_set()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(through.execute, "INSERT INTO kept VALUES (%s)", ["this is the one"])
        assert held.committed.wait(30)
        assert direct.execute("SELECT what FROM kept ORDER BY what").fetchall() == [("another",), ("this is the one",)]
        assert not waiting.done()
        before.cut()
        with pytest.raises(psycopg.OperationalError):
            waiting.result(30)


def test_lets_an_answer_go(before: Proxy, through: psycopg.Connection) -> None:
    """A held reply arrives complete once it is let go."""
    held = before.hold_answer(b"let me go")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(through.execute, "SELECT %s || repeat('x', 300000)", ["let me go"])
        assert held.committed.wait(30)
        held.let_go()
        assert waiting.result(30).fetchone() == ("let me go" + "x" * 300000,)
