"""Lane scheduler: chooses which lanes a handler slot runs next, in batches that take a short time.

Must not run anything. Each handler has one cursor through its lanes. All slots of the worker share the cursor, so no
two of them take the same lanes. Safe in threads.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Final

from receiver.storage.accept.fan_out import unordered
from receiver.storage.queue import wake_ups
from receiver.worker.leases import Leases

# Target seconds for a batch: other slots may be free.
BATCH_SECONDS: Final = 0.25
# The first batch size, and the largest. For larger batches, the saved round trip does not matter.
_FIRST_BATCH: Final = 4
MAX_BATCH: Final = 64


class LaneScheduler:
    """Schedules the lanes of one worker's handlers."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._cursors: defaultdict[str, str] = defaultdict(str)  # handler → cursor: the last lane taken
        self._sizes: defaultdict[str, int] = defaultdict(lambda: _FIRST_BATCH)
        self._lock = threading.Lock()

    def next(self, handler: str) -> list[str]:
        """Return the next ordered lanes of the handler that are due, all of one destination. Empty if no lane is due.

        Raises SQLAlchemyError.
        """
        with self._lock, self._leases.connection() as connection:
            turned = not self._cursors[handler]
            while True:
                some, cursor = wake_ups.due(connection, [handler], after=self._cursors[handler], limit=MAX_BATCH)
                ordered = [lane for lane in some if not unordered(lane)]
                if ordered:
                    destination = ordered[0].rsplit("/", 1)[0]
                    chosen = [lane for lane in ordered[: self._sizes[handler]] if lane.rsplit("/", 1)[0] == destination]
                    self._cursors[handler] = cursor if len(chosen) == len(ordered) else chosen[-1]
                    return chosen
                self._cursors[handler] = cursor
                if not cursor and turned:
                    return []
                turned = turned or not cursor

    def took(self, handler: str, seconds: float) -> None:
        """Report how long the last batch took. The next batch is twice as large, or half."""
        with self._lock:
            if seconds < BATCH_SECONDS / 4:
                self._sizes[handler] = min(MAX_BATCH, 2 * self._sizes[handler])
            elif seconds > BATCH_SECONDS / 2:
                self._sizes[handler] = max(1, self._sizes[handler] // 2)
