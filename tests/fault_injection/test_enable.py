"""Fault injection and the database: the check for production destinations, and cutting connections."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import make_url

from receiver.errors import Unavailable
from receiver.fault_injection import enable
from receiver.storage.registry.changes import RegistryChanges
from tests.support.tcp_proxy import TcpProxy, connect_to, tcp_proxy

_ROOT = Path(__file__).parents[2]
_CUT = """
import socket, sys
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from receiver.fault_injection import enable
from receiver.database.engine import open_engine
ours, theirs = socket.socketpair()
with open_engine(sys.argv[1], pooled=False).connect() as connection:
    connection.execute(text("SELECT 1"))
    enable.cut(sys.argv[1])
    theirs.sendall(b"still here")
    assert ours.recv(10) == b"still here"
    try:
        connection.execute(text("SELECT 1"))
    except OperationalError:
        print("cut")
"""


def _add(registration: RegistryChanges, name: str, environment: str) -> None:
    registration.add_destination(
        name,
        datetime.now(UTC),
        environment=environment,
        require=["token"],
        sources_policy="any",
        on_unknown_source="reject",
        test_messages="accept",
        reply_with=None,
        token="a token of twenty-four characters",
    )


@pytest.fixture
def proxy(database_url: str) -> Iterator[TcpProxy]:
    """A TCP port in front of the database."""
    with tcp_proxy(partial(connect_to, database_url)) as made:
        yield made


def test_a_production_destination_is_named(database_url: str, registration: RegistryChanges) -> None:
    """A production destination is found, also a disabled one. Destinations of other environments are not."""
    for environment in ("development", "staging"):
        _add(registration, environment, environment)
    assert enable.production(database_url) is None
    _add(registration, "ward", "production")
    registration.set_destination("ward", datetime.now(UTC), {"enabled": False})
    assert enable.production(database_url) == "ward"


def test_a_database_that_does_not_answer(database_url: str, proxy: TcpProxy) -> None:
    """A database that is down or does not answer in time raises Unavailable."""
    url = proxy.url(database_url)
    assert enable.production(url) is None
    proxy.freeze()
    with pytest.raises(Unavailable):
        enable.production(url)
    proxy.thaw()
    with pytest.raises(Unavailable, match="OperationalError"):
        enable.production(make_url(database_url).set(host="127.0.0.1", port=1, query={}).render_as_string())


@pytest.mark.parametrize("tcp", [False, True])
def test_every_connection_to_the_database_is_cut(database_url: str, proxy: TcpProxy, tcp: bool) -> None:
    """Every connection of the process to the database is cut, and no other."""
    url = proxy.url(database_url) if tcp else database_url
    done = subprocess.run(
        [sys.executable, "-c", _CUT, url],
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.stdout, done.returncode) == ("cut\n", 0), done.stderr
