"""Has the C library take large blocks from the system one by one, and give each back when it is freed.

glibc does so only until the first large block is freed: from then on blocks of up to 32 MB come from its heaps, where a
body that grows is copied from place to place, and the places stay with the process. Another C library is left as it is.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Final

_M_MMAP_THRESHOLD: Final = -3
# Below the pieces that large bodies come in, above all that small ones need.
_LARGE: Final = 512 * 1024


def large_blocks_apart() -> None:
    """From now on, in this process."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
