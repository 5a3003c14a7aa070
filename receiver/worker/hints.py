"""Tells workers of lanes that have something new, behind the requests: never a round trip within one.

May not be relied on: a hint that is lost costs a second or two, until a worker's sweep finds the lane.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import describe
from receiver.storage.queue import lanes

log: Final = structlog.get_logger(__name__)

# Between two rounds, so that a stream of messages costs a few hints a second, not one a commit: a hint waits that long.
_COALESCE_INTERVAL: Final = 0.05
# After an error; what comes meanwhile is the sweep's.
_PAUSE: Final = 1.0
# More than this wait only where the database does not keep up: the sweep finds the rest.
_MOST: Final = 10_000


class LaneNotifier:
    """One thread a process, started after fork. `hint` is what the ledger calls after a commit; safe in threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wake = threading.Condition()
        self._waiting: dict[str, None] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hints", daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def stop(self) -> None:
        """Tell what waits, as long as that goes quickly, and end."""
        self._stopping.set()
        with self._wake:
            self._wake.notify()
        self._thread.join(2.0)

    def hint(self, lanes: Sequence[str]) -> None:
        """These lanes have something new. Does not wait."""
        with self._wake:
            if len(self._waiting) < _MOST:
                self._waiting.update(dict.fromkeys(lanes))
                self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._stopping.is_set():
                    self._wake.wait()
                told, self._waiting = self._waiting, {}
            if not told:
                return
            try:
                self._tell(list(told))
                self._stopping.wait(_COALESCE_INTERVAL)
            except SQLAlchemyError as exc:
                log.warning("hints.not_told", error=describe(exc), lanes=len(told))
                self._stopping.wait(_PAUSE)

    def _tell(self, told: Sequence[str]) -> None:
        with self._engine.connect() as opened:
            connection = opened.execution_options(isolation_level="AUTOCOMMIT")
            lanes.wake(connection, told)
