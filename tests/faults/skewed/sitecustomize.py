"""In processes under libfaketime: a sleep that it does not get wrong.

CPython sleeps until a moment of the monotonic clock (3.11 and later); libfaketime 0.9.10 takes that for one of the
calendar's, also where it is told to leave the monotonic clock alone, and the system refuses it.
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
