"""The database's clock, for hosts whose own clock may be wrong.

Signatures carry a time, and messages are stored by time. All hosts must judge by one clock, and the one that all of
them see is the database's. Must not set anything.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog
from sqlalchemy import Connection, text

log: Final = structlog.get_logger(__name__)

# Two clocks that NTP synchronizes differ by less than this. Below it, the host's own clock is used.
MAX_CLOCK_SKEW: Final = timedelta(seconds=2)
# A larger difference is not believed: otherwise, a change of the database's clock could revive expired credentials.
# Larger than any time zone error.
MAX_BELIEVED_SKEW: Final = timedelta(hours=24)
# What the operator should do.
FIX: Final = "use NTP to set the clocks of this host and of the database host"
# How long the database may take to answer: the result is as uncertain as that.
_QUERY_TIMEOUT: Final = 1.0


def clock_skew(connection: Connection) -> timedelta | None:
    """Return how far this host's clock is ahead of the database's; None when the answer took too long."""
    began, here = time.monotonic(), datetime.now(UTC)
    # Schema-qualified: a changed search path could put another function before PostgreSQL's.
    theirs: datetime = connection.execute(text("SELECT pg_catalog.clock_timestamp()")).scalar_one()
    took = time.monotonic() - began
    return None if took > _QUERY_TIMEOUT else here + timedelta(seconds=took / 2) - theirs


def skew_message(ahead: timedelta) -> str:
    """Describe how this host's clock differs from another."""
    return f"{abs(ahead).total_seconds():.1f} s {'ahead of' if ahead > timedelta(0) else 'behind'}"


class Clock:
    """The time by the database's clock, once it was compared; by this host's until then, or beyond MAX_BELIEVED_SKEW.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._ahead = timedelta(0)
        self._believed = True

    def now(self) -> datetime:
        """Return the time."""
        return datetime.now(UTC) - self._ahead

    def compare(self, connection: Connection) -> None:
        """Ask the database. Raises SQLAlchemyError."""
        ahead = clock_skew(connection)
        if ahead is None:
            return
        believed = abs(ahead) <= MAX_BELIEVED_SKEW
        if not believed and self._believed:
            log.error(
                "clock.not_believed", ahead=round(ahead.total_seconds(), 1), bound=MAX_BELIEVED_SKEW.total_seconds()
            )
        self._believed = believed
        if abs(ahead) < MAX_CLOCK_SKEW or not believed:
            ahead = timedelta(0)
        if bool(ahead) != bool(self._ahead):
            seconds = round(ahead.total_seconds(), 1)
            if ahead:
                log.warning("clock.apart", ahead=seconds, bound=MAX_CLOCK_SKEW.total_seconds())
            else:
                log.info("clock.together")
        self._ahead = ahead
