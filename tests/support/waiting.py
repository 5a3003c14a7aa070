"""Waiting for what must come about: real processes take their time, on a machine that does many other things."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

DEADLINE: Final = 120.0


def until(holds: Callable[[], T | None], seconds: float = DEADLINE) -> T:
    """What `holds` returns, as soon as that is true. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"did not come about within {seconds:g} s"
        time.sleep(0.02)
    return found
