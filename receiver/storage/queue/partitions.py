"""Partitions by time: created ahead of time, so that what has expired can be dropped whole.

Payloads are kept for weeks, the other tables for years. A search without a time reads an index of every partition, so
those are of a quarter of a year each: there are few of them.

Must not drop anything. Must not block the feed: a partition is created as a separate table and then attached, which
does not block inserts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from sqlalchemy import Connection, text

WEEK: Final = timedelta(days=7)
_LOCK: Final = 0x7061796C6F616473  # "payloads" as a number
_FIRST_WEEK: Final = datetime(2024, 1, 1, tzinfo=UTC)  # a Monday

# Each row of these tables is updated soon after it was written, and then stays unchanged for years: dead rows are at
# the end, in pages that the visibility map names. By default a vacuum starts at a fifth of all rows. Until then, every
# search for pending rows steps over the index entries of finished ones.
_VACUUMED_EARLY: Final = {
    "autovacuum_vacuum_scale_factor": "0.01",
    "autovacuum_vacuum_threshold": "200",
    "autovacuum_analyze_scale_factor": "0.02",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionedTable:
    """A table and its partitions. `clock`: the column that they are by; `ahead`: how many exist from now on.

    `storage`: what PostgreSQL cannot set on the table itself. `append_only`: no row is changed or deleted.
    """

    name: str
    clock: str = "received_at"
    period: Literal["week", "quarter"] = "quarter"
    ahead: int = 3
    storage: Mapping[str, str] = field(default_factory=dict)
    append_only: bool = False

    @property
    def default(self) -> str:
        """Return the partition of rows outside of all others (from a wrong clock)."""
        return f"{self.name}_default"

    def start(self, time: datetime) -> datetime:
        """Return when the partition of `time` begins: a Monday, or the first day of a quarter, 00:00 UTC."""
        if self.period == "week":
            return _FIRST_WEEK + (time - _FIRST_WEEK) // WEEK * WEEK
        time = time.astimezone(UTC)
        return datetime(time.year, (time.month - 1) // 3 * 3 + 1, 1, tzinfo=UTC)

    def end(self, start: datetime) -> datetime:
        """Return when the partition that begins at `start` ends, and the next one begins."""
        return start + WEEK if self.period == "week" else self.start(start + timedelta(days=100))

    def partition(self, start: datetime) -> str:
        """Return the name of the partition that begins at `start`."""
        return (
            f"{self.name}_{start:%Y%m%d}" if self.period == "week" else f"{self.name}_{start:%Y}q{start.month // 3 + 1}"
        )


# A message's rows all bear the time at which it was received, so that one of them leads to the others' partitions.
PAYLOADS: Final = PartitionedTable(name="payloads", period="week", ahead=8)
TABLES: Final[Mapping[str, PartitionedTable]] = {
    each.name: each
    for each in (
        PAYLOADS,
        PartitionedTable(name="messages", storage=_VACUUMED_EARLY),
        PartitionedTable(name="deliveries", storage=_VACUUMED_EARLY),
        PartitionedTable(name="delivery_attempts"),
        PartitionedTable(name="audit_events", clock="at", append_only=True),
    )
}


def make_default(connection: Connection) -> None:
    """Create the default partition of each table: rows outside of every other one are kept too."""
    for table in TABLES.values():
        connection.execute(text(f"CREATE TABLE {table.default} PARTITION OF {table.name} DEFAULT"))
        _finish(connection, table, table.default)


def ensure(connection: Connection, now: datetime) -> list[str]:
    """Create the missing partitions, from that of `now` on. Returns the names of those created.

    Raises OperationalError (55P03) when a lock is not available: try again later, there are weeks of time.
    """
    made = []
    before = connection.scalar(text("SELECT current_setting('lock_timeout')"))
    connection.execute(text("SET LOCAL lock_timeout = '2s'"))
    # One process at a time: others do not see the tables before the commit.
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    for table in TABLES.values():
        start = table.start(now)
        for _ in range(table.ahead):
            name = table.partition(start)
            if connection.scalar(text("SELECT to_regclass(:name)"), {"name": name}) is None:
                _make(connection, table, start)
                made.append(name)
            start = table.end(start)
    connection.execute(text("SELECT set_config('lock_timeout', :before, true)"), {"before": before})
    return made


def _make(connection: Connection, table: PartitionedTable, start: datetime) -> None:
    name, first, last = table.partition(start), f"{start:%Y-%m-%d}+00", f"{table.end(start):%Y-%m-%d}+00"
    # The identity is the table's alone: rows are inserted through it.
    connection.execute(text(f"CREATE TABLE {name} (LIKE {table.name} INCLUDING ALL EXCLUDING IDENTITY)"))
    # Move rows that a host with a fast clock wrote to the default partition: they would prevent attaching.
    early = f"{table.clock} >= '{first}' AND {table.clock} < '{last}'"
    if connection.scalar(text(f"SELECT EXISTS (SELECT FROM {table.default} WHERE {early})")):
        if table.append_only:
            connection.execute(text(f"ALTER TABLE {table.default} DISABLE TRIGGER USER"))
        connection.execute(
            text(
                f"WITH early AS (DELETE FROM {table.default} WHERE {early} RETURNING *) "
                f"INSERT INTO {name} SELECT * FROM early"
            )
        )
        if table.append_only:
            connection.execute(text(f"ALTER TABLE {table.default} ENABLE TRIGGER USER"))
    _finish(connection, table, name)
    connection.execute(
        text(f"ALTER TABLE {table.name} ATTACH PARTITION {name} FOR VALUES FROM ('{first}') TO ('{last}')")
    )


def _finish(connection: Connection, table: PartitionedTable, name: str) -> None:
    """Set what a partition does not get from its table."""
    if table.storage:
        settings = ", ".join(f"{option} = {value}" for option, value in table.storage.items())
        connection.execute(text(f"ALTER TABLE {name} SET ({settings})"))
    if table.append_only:  # the table's trigger for each row is every partition's; that for TRUNCATE is not
        connection.execute(
            text(
                f"CREATE TRIGGER append_only_truncate BEFORE TRUNCATE ON {name} "
                f"FOR EACH STATEMENT EXECUTE FUNCTION append_only('{table.name}')"
            )
        )


def build_index(connection: Connection, name: str, table: PartitionedTable, columns: str) -> None:
    """Build an index on every partition, without blocking the feed. `columns`: what follows the table's name.

    For revisions, in an autocommit block: PostgreSQL does not build an index of a partitioned table concurrently. An
    interrupted call can be repeated.
    """
    partitions = connection.exec_driver_sql(
        f"SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = '{table.name}'::regclass ORDER BY 1"
    ).scalars()
    # Invalid, and used by nothing, until each partition has its part.
    connection.exec_driver_sql(f"CREATE INDEX IF NOT EXISTS {name} ON ONLY {table.name} {columns}")
    for partition in list(partitions):
        part = f"{name}{partition.removeprefix(table.name)}"
        valid = connection.exec_driver_sql(
            f"SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('{part}')"
        ).scalar()
        if valid is False:  # left by an interrupted build
            connection.exec_driver_sql(f"DROP INDEX CONCURRENTLY {part}")
        connection.exec_driver_sql(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {part} ON {partition} {columns}")
        connection.exec_driver_sql(f"ALTER INDEX {name} ATTACH PARTITION {part}")
