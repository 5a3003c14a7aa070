"""Enables fault injection in a process: looks for production destinations, and cuts database connections.

Does nothing if RECEIVER_FAILPOINTS is not set.

Must not decide what happens at a fail-point: receiver.fault_injection.faults does.
"""

from __future__ import annotations

import asyncio
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import psycopg

from receiver.database.engine import describe, normalise
from receiver.errors import Unavailable
from receiver.fault_injection import faults

# Every row counts, even one that is disabled or fails its MAC check: fault injection must not act in production.
_PRODUCTION: Final = "SELECT name FROM destinations WHERE environment = 'production' ORDER BY id LIMIT 1"
_QUERY_TIMEOUT: Final = 2.0
_PORT: Final = 5432


def enable_faults(url: str) -> None:
    """Enable fault injection in this process, for the database at `url`, if the variable is set.

    Raises ConfigurationError when the variable is not valid, or when there is a production destination.
    """
    faults.enable(production=partial(production, url), cut=partial(cut, url))


def production(url: str) -> str | None:
    """The name of a production destination, or None. Raises Unavailable when the database does not answer in 2 s."""
    # In a thread of its own: the caller may run in an event loop.
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(lambda: asyncio.run(asyncio.wait_for(_ask(url), _QUERY_TIMEOUT))).result()
        except (psycopg.Error, OSError) as exc:  # TimeoutError is an OSError
            raise Unavailable(describe(exc)) from None


async def _ask(url: str) -> str | None:
    address = normalise(url).set(drivername="postgresql").render_as_string(hide_password=False)
    async with await psycopg.AsyncConnection.connect(address, autocommit=True) as connection:
        row = await (await connection.execute(_PRODUCTION)).fetchone()
    return None if row is None else str(row[0])


def cut(url: str) -> None:
    """Shut down every connection of this process to the database."""
    parsed = normalise(url)
    port = parsed.port or int(str(parsed.query.get("port", _PORT)))
    for entry in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):  # closed in the meantime, or not connected
            if str(entry.readlink()).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    if _leads_to(connection.getpeername(), port):
                        connection.shutdown(socket.SHUT_RDWR)


def _leads_to(peer: object, port: int) -> bool:
    if isinstance(peer, tuple):
        return bool(peer[1] == port)
    return isinstance(peer, str) and peer.endswith(f".s.PGSQL.{port}")
