"""Tunes a server process: which objects Python's garbage collector looks at, and how often."""

import gc
from typing import Final

# Objects made until the collector looks for cycles among them. A request leaves next to none: Python's default, every
# 700 objects, would run the collector several times a request, and find nothing.
_THRESHOLD: Final = 10_000


def freeze_heap() -> None:
    """Exempt what there is now from collection: called when a process has all that it serves with."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_THRESHOLD, 20, 20)
