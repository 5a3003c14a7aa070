"""Faults of the simulated Redox API: error statuses, invalid responses, and connections that break.

Tests of receiver.outbound inject them with `FakeRedoxApi.fail`. No command does: `simulate --api` injects no fault.

Must not import the simulator, which imports this module.
"""

from __future__ import annotations

import gzip
import threading
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Final, Generic, TypeVar

_BOMB_INFLATED: Final = 100 * 1024 * 1024

T = TypeVar("T")


class ApiFault(Enum):
    """A fault to inject."""

    SERVER_ERROR = auto()  # 500
    BAD_GATEWAY = auto()  # 502
    UNAVAILABLE = auto()  # 503
    GATEWAY_TIMEOUT = auto()  # 504
    RATE_LIMITED = auto()  # 429 with X-RateLimit-Limit, without Retry-After
    UNAUTHORIZED = auto()  # 401 for any token
    GARBAGE = auto()  # 200 with a body that is not JSON
    NOT_HTTP = auto()  # bytes that are not a valid HTTP response
    HUGE = auto()  # 200 and 10 MB
    REDIRECT = auto()  # 307 to `api.redirect_to`
    GZIP_BOMB = auto()  # 200, Content-Encoding: gzip, 100 MB after decompression
    DRIP = auto()  # a response head, one byte every 20 ms, without end
    SILENCE = auto()  # no response; the connection stays open
    DROP_BEFORE = auto()  # the connection is closed before the request is processed
    DROP_AFTER = auto()  # the request is processed, and the connection is closed before the response
    CUT_SHORT = auto()  # processed; half of the response, then the connection is closed


# The request is processed before these faults.
PROCESSED: Final = frozenset({ApiFault.DROP_AFTER, ApiFault.CUT_SHORT})

_STATUSES: Final = {
    ApiFault.SERVER_ERROR: 500,
    ApiFault.BAD_GATEWAY: 502,
    ApiFault.UNAVAILABLE: 503,
    ApiFault.GATEWAY_TIMEOUT: 504,
    ApiFault.RATE_LIMITED: 429,
    ApiFault.UNAUTHORIZED: 401,
}


class ApiFaultQueue(Generic[T]):
    """The faults to inject, by path: first in, first out. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[str, deque[T]] = {}

    def add(self, path: str, fault: T, times: int) -> None:
        """Inject the fault for the next `times` requests at `path` or below it."""
        with self._lock:
            self._queues.setdefault(path, deque()).extend([fault] * times)

    def take(self, path: str) -> T | None:
        """Remove and return the next fault for a request at `path`."""
        with self._lock:
            due = [queue for prefix, queue in self._queues.items() if path.startswith(prefix) and queue]
            return due[0].popleft() if due else None


def complete_response(fault: ApiFault, redirect_to: str) -> tuple[int, bytes, Mapping[str, str]] | None:
    """Return the (status, body, headers) of a fault with a complete response; None if it breaks the connection."""
    if fault in _STATUSES:
        headers = {"X-RateLimit-Limit": "7500"} if fault is ApiFault.RATE_LIMITED else {}
        return _STATUSES[fault], b"the fake Redox API fails on demand", headers
    if fault is ApiFault.GARBAGE:
        return 200, b"<html>this is not JSON</html>", {}
    if fault is ApiFault.HUGE:
        return 200, b" " * (10 * 1024 * 1024), {}
    if fault is ApiFault.REDIRECT:
        return 307, b"", {"Location": redirect_to}
    if fault is ApiFault.GZIP_BOMB:
        return 200, gzip.compress(bytes(_BOMB_INFLATED), 1), {"Content-Encoding": "gzip"}
    return None


def break_connection(
    fault: ApiFault, write: Callable[[bytes], object], response: bytes, stopping: threading.Event
) -> None:
    """Write what comes before the connection is closed. `response`: to a processed request. Ends when `stopping`."""
    if fault is ApiFault.NOT_HTTP:
        write(b"\x15\x03\x01 this is not HTTP\r\n\r\n")
    elif fault is ApiFault.SILENCE:
        stopping.wait()
    elif fault is ApiFault.DRIP:
        write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not stopping.wait(0.02):
            write(b"x")
    elif fault is ApiFault.CUT_SHORT:
        write(response[:-5])
