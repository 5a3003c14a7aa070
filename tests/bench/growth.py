"""Whether frequent operations get slower as the tables fill: with empty tables, and with millions of rows.

Run it as `python -m tests.bench.growth --rows 5000000`. It makes two databases on one durable PostgreSQL: one as after
an hour, and one filled with that many messages. Both have the same number of pending, dead and quarantined records. It
times the same operations in both, in turn: accepting a message, its duplicate, running a lane with one delivery, and
the queries of `messages list`, `deliveries list` and `status`. If two medians differ by more than 15 %, it prints
the plans of the slowest statements, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import Connection, event

from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.operations import queries
from receiver.storage.operations.queries import DeliveryFilter, MessageFilter
from receiver.storage.queue import leases, outcomes, partitions, waiting_deliveries, wake_ups
from tests.bench.lanes import Bench, durable

ALLOWED: Final = 0.15
# A larger difference is noise while it is below this many seconds: a tenth of a round trip.
LEAST: Final = 0.000_05
CHUNK: Final = 250_000
_PLANS: Final = 2
# The rows of the empty database, and the unfinished rows of each.
FIRST: Final = 2_000

# Sealed bodies have the size of those of 4 KB messages.
_FILL: Final = (
    """
INSERT INTO messages (uuid, destination_id, credential_ids, source_id, kind, query, test, log_id, attempt_id,
    message_id, transmission_id, facility, event_time, received_at, peer, digest, size, content_type, state,
    quarantine_reason, id_conflict, patients_indexed_at, mac, mac_key)
SELECT uuidv7(), 1, ARRAY[1], 's' || g % 20, 'PatientAdmin.Arrival', false, false, gen_random_uuid()::text,
    gen_random_uuid()::text, g::text, g::text, 'Main', :at, :at, '127.0.0.1', sha256(g::text::bytea), 4096,
    'application/json', CASE WHEN g <= 2000 AND g % 40 = 7 THEN 'quarantined' ELSE 'accepted' END,
    CASE WHEN g <= 2000 AND g % 40 = 7 THEN 'not_json' END, false, :at, sha256(g::text::bytea), 'mac-1'
FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) g""",
    """
INSERT INTO message_keys (destination_id, key, outside, message_id, received_at)
SELECT destination_id, sha256(log_id::bytea), digest, id, received_at FROM messages WHERE id BETWEEN :low AND :high""",
    """
INSERT INTO payloads (message_id, received_at, payload_key, sealed)
SELECT id, received_at, 'payload-1', decode(repeat(encode(digest, 'hex'), 20) || md5(id::text), 'hex')
FROM messages WHERE id BETWEEN :low AND :high""",
    """
INSERT INTO deliveries (message_id, received_at, destination_id, handler, lane, inline, state, attempts, epoch,
    created_at, error_class, finished_at)
SELECT id, received_at, 1, 'by-source', 'by-source/lab/source:old' || id % 500, id <= 2000 AND id % 80 = 17,
    CASE WHEN id > 2000 OR id % 40 NOT IN (17, 27) THEN 'succeeded' WHEN id % 40 = 17 THEN 'pending' ELSE 'dead' END,
    1, 1, received_at, CASE WHEN id <= 2000 AND id % 40 = 27 THEN 'KeyError' END,
    CASE WHEN id > 2000 OR id % 40 <> 17 THEN received_at END
FROM messages WHERE id BETWEEN :low AND :high AND state = 'accepted'""",
    """
INSERT INTO delivery_attempts (delivery_id, received_at, attempt, epoch, worker, started_at, ended_at, outcome)
SELECT id, received_at, 1, 1, 'host:1234:abcdef01', created_at, created_at, 'succeeded' FROM deliveries
WHERE message_id BETWEEN :low AND :high""",
    """
INSERT INTO patient_digests (digest, message_id, received_at)
SELECT sha256((id / 10)::text::bytea), id, received_at FROM messages WHERE id BETWEEN :low AND :high""",
    """
INSERT INTO audit_events (writer, n, at, action, outcome, actor, peer, destination, message_uuid, detail, mac, mac_key)
SELECT '00000000-0000-4000-8000-000000000001', id, received_at, 'message.receive', state, 'redox', '127.0.0.1', 'lab',
    uuid, '{"credentials":[1],"attempt":"' || attempt_id || '"}', mac, 'mac-1'
FROM messages WHERE id BETWEEN :low AND :high ORDER BY id""",
)


def fill(bench: Bench, rows: int) -> None:
    """Insert messages with their other rows, as if they had arrived evenly over all weeks."""
    with bench.engine.begin() as connection:
        partitions.ensure(connection, datetime.now(UTC))
    for first in range(1, rows + 1, CHUNK):
        last = min(rows, first + CHUNK - 1)
        at = datetime.now(UTC)
        low = bench.scalar("SELECT coalesce(max(id), 0) + 1 FROM messages")
        bench.execute(_FILL[0], first=first, last=last, at=at)
        high = bench.scalar("SELECT max(id) FROM messages")
        for statement in _FILL[1:]:
            bench.execute(statement, low=low, high=high)
    bench.execute("""
        INSERT INTO lanes (lane, handler, destination_id, epoch, state, ready_at)
        SELECT 'by-source/lab/source:old' || g, 'by-source', 1, 1, 'waiting', now() + interval '1 day'
        FROM generate_series(0, 499) g""")


def settle(bench: Bench) -> None:
    """Vacuum and analyze, as autovacuum does in time."""
    with bench.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("VACUUM (ANALYZE)")


class Acts:
    """The measured operations, in one database. Their preparation is not timed."""

    def __init__(self, bench: Bench, ledger: MessageLedger) -> None:
        self._bench = bench
        self._ledger = ledger
        self._number = 0

    def accept(self) -> float:
        """Accept a message, until it is on disk."""
        admitted = self._bench.admitted("new")
        began = time.perf_counter()
        self._ledger.accept(admitted).result(60)
        return time.perf_counter() - began

    def duplicate(self) -> float:
        """Accept a duplicate."""
        admitted = self._bench.admitted("new")
        self._ledger.accept(admitted).result(60)
        began = time.perf_counter()
        self._ledger.accept(admitted).result(60)
        return time.perf_counter() - began

    def claim(self) -> float:
        """Find and claim a lane, read, run and record its delivery, and release the lane."""
        self._number += 1
        self._ledger.accept(self._bench.admitted(f"claimed{self._number}")).result(60)
        lane = f"by-source/lab/source:claimed{self._number}"
        with self._connection() as connection:
            began = time.perf_counter()
            wake_ups.due(connection, ["by-source"], after="by-source/lab/source:claimed", limit=10)
            lease = leases.claim(connection, lane, "bench", 60)
            assert lease is not None
            [waiting] = waiting_deliveries.batch(connection, lease)
            assert outcomes.start(connection, lease, waiting.id) == 1
            assert outcomes.succeed(connection, lease, waiting.id, 1, following=None) == (True, None)
            leases.release(connection, lease)
            return time.perf_counter() - began

    def sweep(self) -> float:
        """Sweep as a worker does for lanes without a hint, past lanes that wait and lanes that requests run."""
        return self._read(lambda connection: wake_ups.due(connection, ["by-source"], after="", limit=500))

    def _connection(self) -> Connection:
        return self._bench.engine.connect().execution_options(isolation_level="AUTOCOMMIT")

    def _read(self, read: Callable[[Connection], object]) -> float:
        with self._connection() as connection:
            began = time.perf_counter()
            read(connection)
            return time.perf_counter() - began

    def messages(self) -> float:
        """`messages list`."""
        return self._read(lambda connection: queries.messages(connection, MessageFilter(), limit=50))

    def messages_of(self) -> float:
        """`messages list --destination lab --state quarantined`."""
        return self._read(
            lambda connection: queries.messages(
                connection, MessageFilter(destination="lab", state="quarantined"), limit=5
            )
        )

    def deliveries(self) -> float:
        """`deliveries list`."""
        return self._read(lambda connection: queries.deliveries(connection, DeliveryFilter(), limit=50))

    def dead(self) -> float:
        """`deliveries list --state dead`."""
        return self._read(lambda connection: queries.deliveries(connection, DeliveryFilter(state="dead"), limit=5))

    def status(self) -> float:
        """`status`."""
        return self._read(queries.feed_status)


ACTS: Final = ("accept", "duplicate", "claim", "sweep", "messages", "messages_of", "deliveries", "dead", "status")


def plans(bench: Bench, act: Callable[[], float]) -> list[str]:
    """Return the plans of the slowest statements of an operation."""
    asked: list[tuple[float, str, object]] = []
    began = 0.0

    def before(*_: object) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        asked.append((time.perf_counter() - began, statement, parameters))

    event.listen(bench.engine, "before_cursor_execute", before)
    event.listen(bench.engine, "after_cursor_execute", after)
    act()
    event.remove(bench.engine, "before_cursor_execute", before)
    event.remove(bench.engine, "after_cursor_execute", after)
    lines = []
    with bench.engine.connect() as connection:
        for took, statement, parameters in sorted(asked, key=lambda each: -each[0])[:_PLANS]:
            if statement.lstrip().startswith(("SELECT", "WITH RECURSIVE")):
                lines.append(f"{took * 1e3:.1f} ms: {' '.join(statement.split())[:200]}")
                lines += connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS) {statement}", parameters).scalars()  # type: ignore[arg-type]  # as given
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill, measure and print. Returns 1 if an operation got slower."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.growth", description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        server = stack.enter_context(durable())
        benches = [stack.enter_context(server.bench(1)) for _ in range(2)]
        for bench in benches:
            bench.enable("by-source")
        began = time.monotonic()
        fill(benches[0], FIRST)
        fill(benches[1], options.rows)
        size = benches[1].scalar("SELECT pg_database_size(current_database())")
        print(f"{options.rows:,} messages, {size / 1e9:.1f} GB, filled in {time.monotonic() - began:.0f} s", flush=True)
        acts = []
        for bench in benches:
            ledger = MessageLedger(bench.engine, bench.keyring, quarantine_quota=1 << 50)
            ledger.start()
            stack.callback(ledger.stop)
            acts.append(Acts(bench, ledger))
            settle(bench)
        return judge(benches, acts, options.rounds)


def judge(benches: Sequence[Bench], acts: Sequence[Acts], rounds: int) -> int:
    """Run all operations in turn, and return the medians."""
    took: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    gc.disable()
    for number in range(rounds + 10):
        for name in ACTS:
            for which in ((0, 1), (1, 0))[number % 2]:
                seconds = getattr(acts[which], name)()
                if number >= 10:  # earlier rounds prepare statements and fill caches
                    took[name, which].append(seconds)
    missed = []
    for name in ACTS:
        empty, full = (statistics.median(took[name, which]) for which in (0, 1))
        grown = full > empty * (1 + ALLOWED) and full - empty > LEAST
        missed += [name] if grown else []
        print(
            f"{name:>12}: empty {empty * 1e3:7.2f} ms, full {full * 1e3:7.2f} ms, {(full / empty - 1) * 100:+5.0f} %"
            f"{'  GROWN' if grown else ''}"
        )
    for name in missed:
        print(f"\n{name}:", *plans(benches[1], getattr(acts[1], name)), sep="\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
