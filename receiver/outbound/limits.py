"""Client limits: timeouts, sizes, attempts, and the rate limit.

Must not send anything.
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
    """The limits of one client, in seconds, bytes and counts.

    `total` limits a whole call, including waits, token requests and retries. Redox itself allows a query 120 s.
    `attempts` includes the first one. Only requests that Redox certainly did not process are tried again, after `pause`
    seconds, doubled each time, with jitter.
    """

    connect: float = 10.0
    read: float = 130.0
    total: float = 150.0
    token: float = 30.0
    connections: int = 64
    request_bytes: int = 40 * _MB  # Redox: 413 from 10 to 40 MB
    upload_bytes: int = 30 * _MB  # Redox: uploads up to 30 MB
    response_bytes: int = 64 * _MB  # larger than any message that Redox carries
    token_reply_bytes: int = 64 * 1024
    attempts: int = 3
    pause: float = 0.5


class SlidingWindow:
    """Rate limiter: at most `requests` in any period of `seconds`. Threads and clients may share it.

    Redox allows 7,500 to 10,000 requests per rolling 5 minutes and address. Processes at one address share this
    allowance: divide it among them.
    """

    def __init__(self, requests: int = 7_500, seconds: float = 300.0) -> None:
        if requests < 1 or seconds <= 0:
            raise ValueError("the rate limit is not valid: use at least one request, and more than 0 seconds")
        self.requests = requests
        self.seconds = seconds
        self._taken: deque[float] = deque()
        self._lock = threading.Lock()

    def reserve(self, now: float, most: float) -> float:
        """Reserve the next free position in the window. Returns how many seconds after `now` (monotonic) it begins.

        If that is more than `most` seconds, raises RateLimited and reserves nothing.
        """
        with self._lock:
            full = len(self._taken) >= self.requests
            at = max(now, self._taken[0] + self.seconds) if full else now
            if at - now > most:
                raise RateLimited(
                    f"{self.requests} requests were sent within {self.seconds:g} s: the next one is allowed "
                    f"in {at - now:.1f} s. Send fewer requests, or increase the limit if Redox increased yours",
                    not_processed=True,
                    retry_after=at - now,
                )
            if full:
                self._taken.popleft()
            self._taken.append(at)
            return at - now

    def wait(self, most: float) -> None:
        """Reserve the next free position, and sleep until it begins."""
        delay = self.reserve(time.monotonic(), most)
        if delay > 0:
            time.sleep(delay)


_UNTIL: ContextVar[float] = ContextVar("receiver.outbound.until")


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Set a deadline for the block. If an outer deadline is earlier, that one applies."""
    until = time.monotonic() + seconds
    reset = _UNTIL.set(min(until, _UNTIL.get(until)))
    try:
        yield
    finally:
        _UNTIL.reset(reset)


def remaining() -> float:
    """Return the seconds until the deadline, at least 0. Call only inside `deadline`."""
    return max(0.0, _UNTIL.get() - time.monotonic())
