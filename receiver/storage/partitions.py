"""The payloads' partitions: one a week, made ahead of time, dropped whole when their time is over.

May not touch message rows: they stay when their payloads go.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import Connection, text

WEEK: Final = timedelta(days=7)
# Made ahead, so that weeks without a worker do not fill the default partition.
AHEAD: Final = 8
_FIRST: Final = datetime(2024, 1, 1, tzinfo=UTC)  # a Monday


def week_of(time: datetime) -> datetime:
    """The Monday 00:00 UTC on which the partition of `time` begins."""
    return _FIRST + (time - _FIRST) // WEEK * WEEK


def name_of(start: datetime) -> str:
    """The table of the week that begins at `start`."""
    return f"payloads_{start:%Y%m%d}"


def ensure(connection: Connection, now: datetime) -> list[str]:
    """Make the partitions from the week of `now` on that are missing; the names of those made."""
    made = []
    for ahead in range(AHEAD):
        start = week_of(now) + ahead * WEEK
        name = name_of(start)
        if connection.scalar(text("SELECT to_regclass(:name)"), {"name": name}) is None:
            connection.execute(text(f"CREATE TABLE IF NOT EXISTS {name} PARTITION OF payloads "
                                    f"FOR VALUES FROM ('{start:%Y-%m-%d}+00') TO ('{start + WEEK:%Y-%m-%d}+00')"))
            made.append(name)
    return made
