"""When each credential was last used: kept in memory, and written once a minute.

Must not cost the accept path a statement: a lost value is replaced by the next use.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Final

import structlog

from receiver.errors import Unavailable
from receiver.storage.accept.batch import BatchWriter

log: Final = structlog.get_logger(__name__)

# Seconds between two writes.
_INTERVAL: Final = 60.0


class LastUsed:
    """Collects uses from any thread; `flush` is for the thread of the batch writer."""

    def __init__(self, recorder: BatchWriter) -> None:
        self._recorder = recorder
        self._lock = threading.Lock()
        self._used: dict[int, datetime] = {}
        self._flushed = time.monotonic()

    def note(self, credentials: Iterable[int], at: datetime) -> None:
        """Record that the credentials were used."""
        with self._lock:
            for credential in credentials:
                self._used[credential] = at

    def flush(self, last: bool) -> None:
        """Write what was noted, at most once a minute unless it is the `last` time."""
        if not last and time.monotonic() - self._flushed < _INTERVAL:
            return
        self._flushed = time.monotonic()
        with self._lock:
            used, self._used = self._used, {}
        if used:
            try:
                self._recorder.credentials_used(used)
            except Unavailable:
                log.warning("ledger.last_used_not_written")
