"""Heartbeats of receiver processes: the address that each serves, whether it still runs, and which keys it holds.

Must not run on the accept path: a separate thread writes heartbeats.
"""

from __future__ import annotations

import os
import socket
import threading
from typing import Final, Literal

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import describe
from receiver.keyring import Keyring

log: Final = structlog.get_logger(__name__)

# Seconds between two heartbeats.
INTERVAL: Final = 5.0
# How long `stop` waits, in seconds, for the last heartbeat to be written.
_STOP_TIMEOUT: Final = 2.0
# Rows of stopped processes are kept this long, for operators to read.
_RETENTION: Final = "1 day"

_SEEN: Final = f"""
WITH old AS (DELETE FROM listeners WHERE coalesce(stopped_at, seen_at) < now() - interval '{_RETENTION}')
INSERT INTO listeners (name, role, host, pid, address, keys)
VALUES (%(name)s, %(role)s, %(host)s, %(pid)s, %(address)s, %(keys)s)
ON CONFLICT (name) DO UPDATE SET seen_at = now(), keys = excluded.keys"""
_STOPPED: Final = "UPDATE listeners SET stopped_at = now() WHERE name = %(name)s"


class Heartbeat:
    """Records every INTERVAL seconds, from `start` to `stop`, that this process serves `address`. Start after fork."""

    def __init__(
        self, engine: Engine, keyring: Keyring, *, name: str, role: Literal["receiver", "admin"], address: str
    ) -> None:
        self._engine = engine
        self._keyring = keyring
        self._row = {"name": name, "role": role, "host": socket.gethostname(), "pid": os.getpid(), "address": address}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Record an orderly stop, if the database accepts it in time."""
        self._stopping.set()
        self._thread.join(_STOP_TIMEOUT)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._write(_SEEN)
            self._stopping.wait(INTERVAL)
        self._write(_STOPPED)

    def _write(self, statement: str) -> None:
        try:
            self._keyring.refresh()
            held = [key.id for key in self._keyring.keys]
            with self._engine.begin() as connection:
                connection.exec_driver_sql(statement, {**self._row, "keys": held})
        except SQLAlchemyError as exc:
            log.debug("heartbeat.not_written", error=describe(exc))
