"""UUID version 7 generator (RFC 9562 5.7): values are ordered by time, so that an index over them grows at its end.

Must not be used for ordering: clocks differ between hosts. The order of arrival is the order of identity columns.
"""

from __future__ import annotations

import os
import time
from uuid import UUID


def uuid7() -> UUID:
    """Return a UUID of 48 bits of Unix milliseconds, the version and variant, and 74 random bits."""
    value = (time.time_ns() // 1_000_000 & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10))
    return UUID(int=value & ~(0xF << 76) & ~(0x3 << 62) | 0x7 << 76 | 0x2 << 62)
