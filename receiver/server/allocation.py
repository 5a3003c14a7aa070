"""Makes the C library map each large block by itself, and unmap it when it is freed.

glibc does so only until the first large block is freed. After that, blocks of up to 32 MB come from its heaps: a
growing body is copied from place to place, and the memory stays with the process. Other C libraries are left unchanged.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Final

_M_MMAP_THRESHOLD: Final = -3
# Smaller than the pieces of large bodies, larger than anything that small bodies need.
_LARGE: Final = 512 * 1024


def large_blocks_apart() -> None:
    """Apply it to this process."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
