"""Which of many lanes a place of a worker takes next: some at a time, as many as it is through with in a moment.

May not run anything. Every handler has a walk of its own through the lanes, which all places of the worker share, so
that no two of them come to the same ones. Safe in threads.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Final

from receiver.storage.accept.fan_out import unordered
from receiver.storage.queue import lanes
from receiver.worker.leases import Leases

# How long a place keeps some lanes, more or less: others may be free.
STAY: Final = 0.25
# So many lanes at a time at the beginning, and at most: beyond that, a round trip more or less is nothing.
_FIRST: Final = 4
MOST: Final = 64


class LaneScheduler:
    """What one worker knows of the many lanes of its handlers."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._walked: defaultdict[str, str] = defaultdict(str)  # handler → the lane that the walk has come to
        self._sizes: defaultdict[str, int] = defaultdict(lambda: _FIRST)
        self._lock = threading.Lock()

    def next(self, handler: str) -> list[str]:
        """Ordered lanes of the handler, of one destination, that are due; none when there is none at all.

        Raises SQLAlchemyError.
        """
        with self._lock, self._leases.connection() as connection:
            turned = not self._walked[handler]
            while True:
                some, came_to = lanes.due(connection, [handler], after=self._walked[handler], limit=MOST)
                ordered = [lane for lane in some if not unordered(lane)]
                if ordered:
                    destination = ordered[0].rsplit("/", 1)[0]
                    chosen = [lane for lane in ordered[: self._sizes[handler]] if lane.rsplit("/", 1)[0] == destination]
                    self._walked[handler] = came_to if len(chosen) == len(ordered) else chosen[-1]
                    return chosen
                self._walked[handler] = came_to
                if not came_to and turned:
                    return []
                turned = turned or not came_to

    def took(self, handler: str, seconds: float) -> None:
        """How long the last ones took: the next are twice as many, or half."""
        with self._lock:
            if seconds < STAY / 4:
                self._sizes[handler] = min(MOST, 2 * self._sizes[handler])
            elif seconds > STAY / 2:
                self._sizes[handler] = max(1, self._sizes[handler] // 2)
