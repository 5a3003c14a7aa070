"""The payloads' partitions: made ahead, in nobody's way, and none lacking keeps anything out."""

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
from sqlalchemy.exc import OperationalError

from receiver.database.engine import sqlstate
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence.verify import verify
from receiver.storage.queue.partitions import WEEK, WEEKS_AHEAD, ensure, name_of, week_of
from tests.storage.door import Door, body
from tests.storage.hand import arrive

LATER = datetime.now(UTC) + 100 * WEEK


def put(engine: Engine, at: datetime, number: int = 1) -> str:
    """Write a payload of that time; the table that it is in."""
    with engine.begin() as connection:
        return str(
            connection.execute(
                text(
                    "INSERT INTO payloads (message_id, received_at, payload_key, sealed) VALUES (:n, :at, 'k', 'x') "
                    "RETURNING tableoid::regclass"
                ),
                {"n": number, "at": at},
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
    begin = week_of(datetime.fromisoformat(time))
    assert name_of(begin) == f"payloads_{start}"
    assert begin.weekday() == 0


def test_the_weeks_ahead_are_made_once(engine: Engine) -> None:
    """The first call makes what is missing, the second nothing; weeks that follow one another have no gap."""
    with engine.begin() as connection:
        made = ensure(connection, LATER)
        assert made == [name_of(week_of(LATER) + n * WEEK) for n in range(WEEKS_AHEAD)]
        assert ensure(connection, LATER) == []
        assert ensure(connection, LATER + WEEK) == [name_of(week_of(LATER) + WEEKS_AHEAD * WEEK)]
    for n in range(WEEKS_AHEAD + 1):
        begin = week_of(LATER) + n * WEEK
        assert put(engine, begin, n) == put(engine, begin + WEEK - timedelta(microseconds=1), n) == name_of(begin)


def test_the_first_migration_has_made_those_of_now(engine: Engine) -> None:
    """A receiver that runs before any worker did writes into a partition of its own."""
    now = datetime.now(UTC)
    assert put(engine, now) == name_of(week_of(now))


@pytest.mark.parametrize("off", [timedelta(days=-3000), timedelta(days=3000)])
def test_a_clock_that_is_far_off_loses_nothing(engine: Engine, off: timedelta) -> None:
    """What no week takes is kept all the same."""
    assert put(engine, datetime.now(UTC) + off) == "payloads_default"


def test_what_came_before_its_week_was_made_moves_into_it(engine: Engine) -> None:
    """Else a partition could never be made of a week that a clock ahead of its time wrote for."""
    begin = week_of(LATER)
    for n, at in enumerate([begin, begin + WEEK - timedelta(microseconds=1), begin - timedelta(microseconds=1)]):
        assert put(engine, at, n) == "payloads_default"
    with engine.begin() as connection:
        ensure(connection, LATER)
        rows = connection.execute(text("SELECT message_id, tableoid::regclass::text FROM payloads ORDER BY message_id"))
        assert [tuple(row) for row in rows] == [(0, name_of(begin)), (1, name_of(begin)), (2, "payloads_default")]


def test_partitions_are_alike(engine: Engine) -> None:
    """Columns, nulls and the key are those of the table."""
    with engine.begin() as connection:
        ensure(connection, LATER)
        shapes = connection.execute(
            text(
                "SELECT i.inhrelid::regclass::text, "
                "(SELECT array_agg((attname, atttypid, attnotnull)::text ORDER BY attnum) FROM pg_attribute "
                " WHERE attrelid = i.inhrelid AND attnum > 0), "
                "(SELECT array_agg(pg_get_constraintdef(oid)) FROM pg_constraint "
                " WHERE conrelid = i.inhrelid AND contype = 'p'), "
                "(SELECT count(*) FROM pg_index WHERE indrelid = i.inhrelid) "
                "FROM pg_inherits i WHERE inhparent = 'payloads'::regclass"
            )
        ).all()
    assert len(shapes) >= 2 * WEEKS_AHEAD + 1
    assert len({str(tuple(shape)[1:]) for shape in shapes}) == 1


def test_the_feed_goes_on_while_partitions_are_made(door: Door, ledger: MessageLedger) -> None:
    """Whoever reads all payloads for an hour, as a backup does, must not make the feed wait for the next week.

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
        assert len(ensure(connection, LATER)) == WEEKS_AHEAD
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
    assert (len(made), others) == (WEEKS_AHEAD, [[]])


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
        begin = week_of(datetime.now(UTC))
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
