"""Lane notifications: tells workers which lanes have new deliveries, after the request, without a round trip in it.

Must not be relied on: if a notification is lost, a worker's sweep finds the lane one or two seconds later.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import describe
from receiver.storage.queue import wake_ups

log: Final = structlog.get_logger(__name__)

# Seconds between two rounds. A stream of messages then costs a few notifications a second instead of one per commit.
_COALESCE_INTERVAL: Final = 0.05
# Seconds to wait after an error. The sweep finds the lanes of that time.
_PAUSE: Final = 1.0
# More lanes than this wait only if the database is too slow. The sweep finds the rest.
_MOST: Final = 10_000


class LaneNotifier:
    """One thread per process, started after fork. The ledger calls `hint` after a commit. Safe in threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wake = threading.Condition()
        self._waiting: dict[str, None] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hints", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Send the pending notifications if this is quick, and end the thread."""
        self._stopping.set()
        with self._wake:
            self._wake.notify()
        self._thread.join(2.0)

    def hint(self, lanes: Sequence[str]) -> None:
        """Queue a notification for these lanes. Does not block."""
        with self._wake:
            if len(self._waiting) < _MOST:
                self._waiting.update(dict.fromkeys(lanes))
                self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._stopping.is_set():
                    self._wake.wait()
                batch, self._waiting = self._waiting, {}
            if not batch:
                return
            try:
                self._notify(list(batch))
                self._stopping.wait(_COALESCE_INTERVAL)
            except SQLAlchemyError as exc:
                log.warning("hints.not_told", error=describe(exc), lanes=len(batch))
                self._stopping.wait(_PAUSE)

    def _notify(self, batch: Sequence[str]) -> None:
        with self._engine.connect() as opened:
            connection = opened.execution_options(isolation_level="AUTOCOMMIT")
            wake_ups.wake(connection, batch)
