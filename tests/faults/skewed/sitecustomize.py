"""For processes under libfaketime: a `time.sleep` that works.

CPython (3.11 and later) sleeps until a time of the monotonic clock. libfaketime 0.9.10 takes that time for one of the
real-time clock, even where it must leave the monotonic clock alone, and the system call fails.
"""

from __future__ import annotations

import select
import time
from typing import SupportsIndex


def _sleep(seconds: float | SupportsIndex) -> None:
    seconds = seconds if isinstance(seconds, float) else seconds.__index__()
    if seconds < 0:
        raise ValueError("sleep length must be non-negative")
    select.select([], [], [], seconds)


time.sleep = _sleep
