"""Names of lanes: HANDLER/DESTINATION/REST. In an unordered lane, no delivery waits for an earlier one.

Must not know what a lane holds.
"""

from __future__ import annotations

import re
from typing import Final

# A regular expression for the names of unordered lanes, `handler/destination/any:N`, as an SQL literal. Partial indexes
# have it in their conditions: PostgreSQL uses them only for the same text.
UNORDERED: Final = "'^[^/]+/[^/]+/any:'"
_UNORDERED_LANE: Final = re.compile(UNORDERED.strip("'"))


def is_unordered(lane: str) -> bool:
    """Return whether the lane is unordered."""
    return _UNORDERED_LANE.match(lane) is not None
