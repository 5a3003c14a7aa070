"""Window counter: counts keys within a window of time. Everything that limits what strangers cause counts with it.

Must not read a clock: times are seconds of a monotonic clock, from the caller. Not safe in threads.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

MINUTE: Final = 60.0


class WindowCounter(Generic[Key]):
    """How often each key was counted since the window began. `total`: all keys together.

    `seconds`: the length of the window. `keys`: at most this many are remembered; after that, the one that was counted
    longest ago is forgotten. `began`: the first window begins with the first `roll`, unless this says when it began.
    """

    def __init__(self, seconds: float = MINUTE, *, keys: int | None = None, began: float = -math.inf) -> None:
        self.seconds = seconds
        self._most = math.inf if keys is None else keys
        self._began = began
        self._counts: OrderedDict[Key, int] = OrderedDict()
        self.total = 0

    def __getitem__(self, key: Key) -> int:
        return self._counts.get(key, 0)

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, key: Key) -> int:
        """Count the key once more; how often it was counted in this window."""
        count = self._counts[key] = self._counts.get(key, 0) + 1
        self._counts.move_to_end(key)
        self.total += 1
        if len(self._counts) > self._most:
            self._counts.popitem(last=False)
        return count

    def ended(self, now: float) -> bool:
        """Whether the window is over."""
        return now - self._began >= self.seconds

    def begin(self, now: float) -> None:
        """Begin a new window: every count is 0."""
        self._began, self.total = now, 0
        self._counts.clear()

    def roll(self, now: float) -> None:
        """Begin a new window if this one is over."""
        if self.ended(now):
            self.begin(now)
