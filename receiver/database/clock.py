"""The database's clock, as a host knows it whose own may be wrong.

What is signed says when, and a message is filed by its time: every host has to judge by one clock, and the one that all
of them see is the database's. May not set anything.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog
from sqlalchemy import Connection, text

log: Final = structlog.get_logger(__name__)

# Two clocks that NTP keeps are no further apart than this; below it a host's own is as good as any.
MAX_CLOCK_SKEW: Final = timedelta(seconds=2)
# A clock that is further away is not believed: with it, whoever sets the database's clock could make credentials live
# again that have ended. More than any mistake about a time zone.
BELIEVED: Final = timedelta(hours=24)
# What is to be done about it.
FIX: Final = "let NTP set the clocks of this host and of the database's"
# How long the database may take to say its time: what it says is as uncertain as that.
_QUERY_TIMEOUT: Final = 1.0


def clock_skew(connection: Connection) -> timedelta | None:
    """How far this host's clock is ahead of the database's; None when it took too long to say."""
    began, here = time.monotonic(), datetime.now(UTC)
    # Named with its schema: a search path that was changed could put another function before PostgreSQL's.
    theirs: datetime = connection.execute(text("SELECT pg_catalog.clock_timestamp()")).scalar_one()
    took = time.monotonic() - began
    return None if took > _QUERY_TIMEOUT else here + timedelta(seconds=took / 2) - theirs


def skew_message(ahead: timedelta) -> str:
    """In words: how this host's clock stands to another."""
    return f"{abs(ahead).total_seconds():.1f} s {'ahead of' if ahead > timedelta(0) else 'behind'}"


class Clock:
    """The time by the database's clock, once it was asked; by this host's until then, and where they are further apart
    than BELIEVED. Safe in threads.
    """

    def __init__(self) -> None:
        self._ahead = timedelta(0)
        self._believed = True

    def now(self) -> datetime:
        """The time."""
        return datetime.now(UTC) - self._ahead

    def compare(self, connection: Connection) -> None:
        """Ask the database. Raises SQLAlchemyError."""
        ahead = clock_skew(connection)
        if ahead is None:
            return
        believed = abs(ahead) <= BELIEVED
        if not believed and self._believed:
            log.error("clock.not_believed", ahead=round(ahead.total_seconds(), 1), bound=BELIEVED.total_seconds())
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
