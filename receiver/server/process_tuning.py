"""Tuning of a server process: which objects Python's garbage collector scans, and how often."""

import gc
from typing import Final

# New objects until the collector runs. A request leaves almost no cycles: Python's default, 700, would run the
# collector several times for each request and find nothing.
_THRESHOLD: Final = 10_000


def freeze_heap() -> None:
    """Exempt all present objects from collection. Call it when the process has loaded all that it serves with."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_THRESHOLD, 20, 20)
