"""Wait for a fact: real processes take their time on a machine that does other work too."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

DEADLINE: Final = 120.0  # seconds
POLL_INTERVAL: Final = 0.02  # seconds


def until(
    holds: Callable[[], T | None],
    what: str = "the condition",
    *,
    seconds: float = DEADLINE,
    interval: float = POLL_INTERVAL,
) -> T:
    """Return what `holds` returns, as soon as that is true. Fail after `seconds`, naming `what`.

    `interval`: seconds between two calls of `holds`.
    """
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"waited {seconds:g} s for: {what}"
        time.sleep(interval)
    return found
