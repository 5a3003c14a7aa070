"""The partitions: made ahead, in nobody's way, and none lacking keeps anything out."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg.errors import LockNotAvailable
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

from receiver.database.engine import sqlstate
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence.verify import verify
from receiver.storage.queue.partitions import PAYLOADS, TABLES, WEEK, PartitionedTable, ensure
from tests.storage.door import Door, body
from tests.storage.hand import arrive

LATER = datetime.now(UTC) + 100 * WEEK
AHEAD = sum(each.ahead for each in TABLES.values())

# A row of each table at :at.
ROWS = {
    "payloads": "INSERT INTO payloads (message_id, received_at, payload_key, sealed) VALUES (:n, :at, 'k', 'x')",
    "messages": (
        "INSERT INTO messages (uuid, destination_id, credential_ids, query, test, received_at, peer, digest, size, "
        "state, id_conflict, mac, mac_key) "
        "VALUES (gen_random_uuid(), :n, '{}', false, false, :at, 'p', '', 1, 'accepted', false, '', '')"
    ),
    "deliveries": (
        "INSERT INTO deliveries (message_id, received_at, destination_id, handler, lane, inline) "
        "VALUES (:n, :at, 1, 'h', 'h/d/x', false)"
    ),
    "delivery_attempts": (
        "INSERT INTO delivery_attempts (delivery_id, received_at, attempt, epoch, worker, started_at, outcome) "
        "VALUES (:n, :at, 1, 1, 'w', now(), 'succeeded')"
    ),
    "audit_events": (
        "INSERT INTO audit_events (writer, n, at, action, outcome, actor, mac, mac_key) "
        "VALUES (gen_random_uuid(), :n, :at, 'a.b', 'c', 'd', '', '')"
    ),
}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def put(engine: Engine, at: datetime, number: int = 1, table: PartitionedTable = PAYLOADS) -> str:
    """Write a row of that time; the partition that it is in."""
    with engine.begin() as connection:
        return str(
            connection.execute(
                text(f"{ROWS[table.name]} RETURNING tableoid::regclass"), {"n": number, "at": at}
            ).scalar_one()
        )


@pytest.mark.parametrize(
    ("time", "start"),
    [
        ("2024-01-01T00:00:00+00:00", "20240101"),
        ("2024-01-07T23:59:59.999999+00:00", "20240101"),
        ("2024-01-08T00:00:00+00:00", "20240108"),
        ("2026-11-24T03:00:00+00:00", "20261123"),
        ("2023-12-31T23:59:59+00:00", "20231225"),
        ("2024-01-07T23:30:00-05:00", "20240108"),
    ],
)
def test_a_week_begins_on_monday_at_midnight_utc(time: str, start: str) -> None:
    """Before the first one, too, and whatever the time's zone."""
    begin = PAYLOADS.start(datetime.fromisoformat(time))
    assert PAYLOADS.partition(begin) == f"payloads_{start}"
    assert begin.weekday() == 0


@pytest.mark.parametrize(
    ("time", "name", "end"),
    [
        ("2024-01-01T00:00:00+00:00", "2024q1", "2024-04-01"),
        ("2024-03-31T23:59:59.999999+00:00", "2024q1", "2024-04-01"),
        ("2024-03-31T23:30:00-05:00", "2024q2", "2024-07-01"),
        ("2026-08-15T03:00:00+00:00", "2026q3", "2026-10-01"),
        ("2026-12-31T23:59:59+00:00", "2026q4", "2027-01-01"),
    ],
)
def test_a_quarter_begins_with_its_first_month(time: str, name: str, end: str) -> None:
    """At midnight UTC, whatever the time's zone, and the next follows without a gap."""
    messages = TABLES["messages"]
    begin = messages.start(datetime.fromisoformat(time))
    assert messages.partition(begin) == f"messages_{name}"
    assert f"{messages.end(begin):%Y-%m-%d}" == end


@every_table
def test_those_ahead_are_made_once(engine: Engine, table: PartitionedTable) -> None:
    """The first call makes what is missing, the second nothing; partitions that follow one another have no gap."""
    begins = [table.start(LATER)]
    for _ in range(table.ahead):
        begins.append(table.end(begins[-1]))
    with engine.begin() as connection:
        made = ensure(connection, LATER)
        assert [each for each in made if each in map(table.partition, begins)] == [*map(table.partition, begins[:-1])]
        assert ensure(connection, LATER) == []
        assert table.partition(begins[-1]) in ensure(connection, begins[1])
    for n, begin in enumerate(begins):
        last = table.end(begin) - timedelta(microseconds=1)
        assert put(engine, begin, n, table) == put(engine, last, n + 100, table) == table.partition(begin)


@every_table
def test_the_first_migration_has_made_those_of_now(engine: Engine, table: PartitionedTable) -> None:
    """A receiver that runs before any worker did writes into a partition of its own."""
    now = datetime.now(UTC)
    assert put(engine, now, table=table) == table.partition(table.start(now))


@every_table
@pytest.mark.parametrize("off", [timedelta(days=-3000), timedelta(days=3000)])
def test_a_clock_that_is_far_off_loses_nothing(engine: Engine, off: timedelta, table: PartitionedTable) -> None:
    """What no partition takes is kept all the same."""
    assert put(engine, datetime.now(UTC) + off, table=table) == table.default


@every_table
def test_what_came_before_its_partition_was_made_moves_into_it(engine: Engine, table: PartitionedTable) -> None:
    """Else none could ever be made of a time that a clock ahead of its time wrote for."""
    begin = table.start(LATER)
    name, moment = table.partition(begin), timedelta(microseconds=1)
    for n, at in enumerate([begin, table.end(begin) - moment, begin - moment]):
        assert put(engine, at, n, table) == table.default
    with engine.begin() as connection:
        ensure(connection, LATER)
        rows = connection.execute(
            text(f"SELECT tableoid::regclass::text FROM {table.name} WHERE {table.clock} > :at ORDER BY {table.clock}"),
            {"at": begin - WEEK},
        )
        assert [row[0] for row in rows] == [table.default, name, name]


def test_no_partition_of_the_audit_lets_a_row_be_changed(engine: Engine) -> None:
    """Neither through the table nor by a partition's own name; the default one neither, after rows moved out of it."""
    audit = TABLES["audit_events"]
    now = datetime.now(UTC)
    partitions = {put(engine, at, table=audit) for at in (now, LATER, LATER + 100 * WEEK)}
    with engine.begin() as connection:
        ensure(connection, LATER)
    partitions |= {audit.partition(audit.start(LATER)), audit.default}
    for name in ("audit_events", *partitions):
        for statement in ("DELETE FROM {}", "UPDATE {} SET n = 2", "TRUNCATE {}"):
            with pytest.raises(DBAPIError) as caught, engine.begin() as connection:
                connection.execute(text(statement.format(name)))
            assert sqlstate(caught.value) == "23001", (statement, name)


@every_table
def test_partitions_are_alike(engine: Engine, table: PartitionedTable) -> None:
    """Columns, nulls, the key, and how early they are vacuumed."""
    with engine.begin() as connection:
        ensure(connection, LATER)
        shapes = connection.execute(
            text(
                "SELECT i.inhrelid::regclass::text, "
                "(SELECT array_agg((attname, atttypid, attnotnull)::text ORDER BY attnum) FROM pg_attribute "
                " WHERE attrelid = i.inhrelid AND attnum > 0), "
                "(SELECT array_agg(pg_get_constraintdef(oid)) FROM pg_constraint "
                " WHERE conrelid = i.inhrelid AND contype = 'p'), "
                "(SELECT count(*) FROM pg_index WHERE indrelid = i.inhrelid), "
                "(SELECT count(*) FROM pg_trigger WHERE tgrelid = i.inhrelid), "
                "(SELECT reloptions FROM pg_class WHERE oid = i.inhrelid) "
                f"FROM pg_inherits i WHERE inhparent = '{table.name}'::regclass"
            )
        ).all()
    assert len(shapes) >= 2 * table.ahead + 1
    assert len({str(tuple(shape)[1:]) for shape in shapes}) == 1


def test_the_feed_goes_on_while_partitions_are_made(door: Door, ledger: MessageLedger) -> None:
    """A reader of all payloads, such as a backup that takes an hour, does not block the feed.

    Guards the ATTACH: CREATE … PARTITION OF waits for the reader, and every writer waits behind it.
    """
    with door.engine.connect() as backup, door.engine.connect() as maker:
        backup.execute(text("SELECT count(*) FROM payloads"))  # holds its lock until the transaction's end

        def make() -> None:
            with pytest.raises(OperationalError) as caught:
                ensure(maker, LATER)
            codes.append(sqlstate(caught.value))

        codes: list[str | None] = []
        thread = threading.Thread(target=make)
        thread.start()
        accepted = 0
        while thread.is_alive():
            assert ledger.accept(door.admit(body(f"log-{accepted}"))).result(1).outcome == "unhandled"
            accepted += 1
        thread.join()
        maker.rollback()
    assert codes == ["55P03"]  # told to come again, and not waiting for ever
    assert accepted
    with door.engine.begin() as connection:
        assert len(ensure(connection, LATER)) == AHEAD
        assert verify(connection, door.keyring, payloads=True).first_bad is None


def test_two_workers_make_them_once(engine: Engine) -> None:
    """The second waits for the first, and has nothing to do."""
    with engine.connect() as first, engine.connect() as second:
        made = ensure(first, LATER)
        others: list[list[str]] = []
        thread = threading.Thread(target=lambda: others.append(ensure(second, LATER)))
        thread.start()
        first.commit()
        thread.join()
        second.commit()
    assert (len(made), others) == (AHEAD, [[]])


def test_what_follows_in_the_transaction_waits_as_long_as_it_likes(engine: Engine) -> None:
    """The short patience is for this alone."""
    with engine.begin() as connection:
        ensure(connection, LATER)
        assert connection.scalar(text("SHOW lock_timeout")) == "0"


def test_a_ledger_writes_by_its_own_clock(door: Door, open_ledger: Callable[..., MessageLedger]) -> None:
    """The message and its payload bear one time, so that the one leads to the other's partition."""
    open_ledger().accept(door.admit(body())).result(10)
    assert door.value("SELECT m.received_at = p.received_at FROM messages m JOIN payloads p ON p.message_id = m.id")


class TestTheSqlOfTheDocument:
    """deploy/PERFORMANCE.md says what to type to drop a week's payloads; it is run here as it stands there."""

    @pytest.fixture
    def typed(self) -> tuple[str, str]:
        """(what counts, what drops), for the week of now."""
        document = (Path(__file__).parents[3] / "deploy" / "PERFORMANCE.md").read_text()
        begin = PAYLOADS.start(datetime.now(UTC))
        (block,) = re.findall(r"```sql\n(.*?)```", document, re.DOTALL)
        for then, now in (
            ("20260105", f"{begin:%Y%m%d}"),
            ("2026-01-05", f"{begin:%Y-%m-%d}"),
            ("2026-01-12", f"{begin + WEEK:%Y-%m-%d}"),
        ):
            assert then in block
            block = block.replace(then, now)
        count, drop = block.split("BEGIN;")
        return count, f"BEGIN;{drop}"

    def run(self, door: Door, sql: str) -> int | None:
        """Run statements as psql does; the number that the first of them answers, if it answers one."""
        url = door.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            row = cursor.fetchone() if cursor.description else None
        return None if row is None else int(row[0])

    def test_it_drops_the_payloads_and_nothing_else(
        self, door: Door, ledger: MessageLedger, typed: tuple[str, str]
    ) -> None:
        """The messages stay, with evidence that holds, and the next message of that week is taken in."""
        ledger.accept(door.admit(body())).result(10)
        count, drop = typed
        assert self.run(door, count) == 0
        self.run(door, drop)
        assert door.value("SELECT count(*) FROM payloads") == 0
        assert door.value("SELECT count(*) FROM messages") == 1
        assert ledger.accept(door.admit(body("log-2"))).result(10).outcome == "unhandled"
        with door.engine.begin() as connection:
            assert verify(connection, door.keyring, payloads=True).first_bad is None
            ensure(connection, datetime.now(UTC))

    def test_it_counts_what_still_needs_its_payload(
        self, door: Door, ledger: MessageLedger, typed: tuple[str, str]
    ) -> None:
        """A message in quarantine, and one whose delivery waits or is dead."""
        door.enable()
        arrive(door, ledger, body(), b"no json", body("log-2", kind="Results.New"))
        assert self.run(door, typed[0]) == 3
        door.rows("UPDATE deliveries SET state = 'succeeded' WHERE id = (SELECT min(id) FROM deliveries)")
        door.rows("UPDATE deliveries SET state = 'dead' WHERE state = 'pending'")
        assert self.run(door, typed[0]) == 2

    def test_it_gives_up_where_the_feed_would_wait(
        self, door: Door, ledger: MessageLedger, typed: tuple[str, str]
    ) -> None:
        """A backup that reads all payloads keeps the lock: after two seconds the feed goes on, and nothing is gone."""
        ledger.accept(door.admit(body())).result(10)
        with door.engine.connect() as backup:
            backup.execute(text("SELECT count(*) FROM payloads"))
            with pytest.raises(LockNotAvailable):
                self.run(door, typed[1])
        assert door.value("SELECT count(*) FROM payloads") == 1
