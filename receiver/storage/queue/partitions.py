"""Weekly partitions of the table `payloads`: created ahead of time, and dropped whole when they expire.

Must not touch message rows: they stay when their payloads are dropped. Must not block the feed: a partition is created
as a separate table and then attached, which does not block inserts.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import Connection, text

WEEK: Final = timedelta(days=7)
# Created ahead, so that weeks without a worker do not fill the default partition.
WEEKS_AHEAD: Final = 8
_LOCK: Final = 0x7061796C6F616473  # "payloads" as a number
_FIRST_WEEK: Final = datetime(2024, 1, 1, tzinfo=UTC)  # a Monday


def week_of(time: datetime) -> datetime:
    """Return the Monday 00:00 UTC on which the partition of `time` begins."""
    return _FIRST_WEEK + (time - _FIRST_WEEK) // WEEK * WEEK


def name_of(start: datetime) -> str:
    """Return the table name of the week that begins at `start`."""
    return f"payloads_{start:%Y%m%d}"


def ensure(connection: Connection, now: datetime) -> list[str]:
    """Create the missing partitions, from the week of `now` on. Returns the names of those created.

    Raises OperationalError (55P03) when a lock is not available: try again later, there are weeks of time.
    """
    made = []
    before = connection.scalar(text("SELECT current_setting('lock_timeout')"))
    connection.execute(text("SET LOCAL lock_timeout = '2s'"))
    # One process at a time: others do not see the tables before the commit.
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    for ahead in range(WEEKS_AHEAD):
        start = week_of(now) + ahead * WEEK
        name = name_of(start)
        if connection.scalar(text("SELECT to_regclass(:name)"), {"name": name}) is None:
            _make(connection, name, start)
            made.append(name)
    connection.execute(text("SELECT set_config('lock_timeout', :before, true)"), {"before": before})
    return made


def _make(connection: Connection, name: str, start: datetime) -> None:
    first, last = f"{start:%Y-%m-%d}+00", f"{start + WEEK:%Y-%m-%d}+00"
    connection.execute(text(f"CREATE TABLE {name} (LIKE payloads INCLUDING ALL)"))
    # Move rows that a host with a fast clock wrote to the default partition: they would prevent attaching.
    connection.execute(
        text(
            f"WITH early AS (DELETE FROM payloads_default WHERE received_at >= '{first}' AND received_at < '{last}' "
            f"RETURNING *) INSERT INTO {name} SELECT * FROM early"
        )
    )
    connection.execute(text(f"ALTER TABLE payloads ATTACH PARTITION {name} FOR VALUES FROM ('{first}') TO ('{last}')"))
