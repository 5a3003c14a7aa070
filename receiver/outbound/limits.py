"""How much and how fast: time-outs, sizes, attempts, and the rolling window of requests.

May not send anything.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from receiver.outbound.errors import RateLimited

_MB: Final = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Seconds, bytes and counts for one client.

    `total` bounds a whole call with its waiting, token requests and repeats. Redox itself gives a query 120 s.
    `attempts` counts the first; only what was certainly not processed is tried again, after `pause` seconds, doubled
    each time, with jitter.
    """

    connect: float = 10.0
    read: float = 130.0
    total: float = 150.0
    token: float = 30.0
    connections: int = 64
    request_bytes: int = 40 * _MB  # Redox: 413 from 10 to 40 MB on
    upload_bytes: int = 30 * _MB  # Redox: uploads, up to 30 MB
    response_bytes: int = 64 * _MB  # above the largest message that Redox carries
    token_reply_bytes: int = 64 * 1024
    attempts: int = 3
    pause: float = 0.5


class SlidingWindow:
    """At most `requests` in any `seconds`, whoever asks from whichever thread; may be shared by several clients.

    Redox: 7,500 to 10,000 requests per rolling 5 minutes and address. Processes behind one address share Redox's
    allowance: divide it among them.
    """

    def __init__(self, requests: int = 7_500, seconds: float = 300.0) -> None:
        if requests < 1 or seconds <= 0:
            raise ValueError("a window takes at least one request, and lasts longer than no time")
        self.requests = requests
        self.seconds = seconds
        self._taken: deque[float] = deque()
        self._lock = threading.Lock()

    def reserve(self, now: float, most: float) -> float:
        """Take the next free place and say how many seconds from `now` (monotonic) it lies.

        Raises RateLimited, and takes none, when that is more than `most` seconds.
        """
        with self._lock:
            full = len(self._taken) >= self.requests
            at = max(now, self._taken[0] + self.seconds) if full else now
            if at - now > most:
                raise RateLimited(
                    f"{self.requests} requests within {self.seconds:g} s are out, and the next may go "
                    f"only in {at - now:.1f} s; send less, or raise the limit if Redox raised yours",
                    not_processed=True,
                    retry_after=at - now,
                )
            if full:
                self._taken.popleft()
            self._taken.append(at)
            return at - now

    def wait(self, most: float) -> None:
        """Take the next free place, and sleep until it comes."""
        delay = self.reserve(time.monotonic(), most)
        if delay > 0:
            time.sleep(delay)


_UNTIL: ContextVar[float] = ContextVar("receiver.outbound.until")


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Everything inside ends within `seconds`; a deadline outside that is nearer stays the nearer."""
    until = time.monotonic() + seconds
    reset = _UNTIL.set(min(until, _UNTIL.get(until)))
    try:
        yield
    finally:
        _UNTIL.reset(reset)


def remaining() -> float:
    """Seconds to the deadline, never below zero. Only inside `deadline`."""
    return max(0.0, _UNTIL.get() - time.monotonic())
