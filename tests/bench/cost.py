"""The cost of a message: rows, bytes on disk, bytes of WAL, CPU; and the sum for several rates.

Run it as `python -m tests.bench.cost`. Messages of 4 KB go through real receivers on one durable PostgreSQL to an idle
handler, run by real workers: by default two independent receiver processes, as on two hosts, and four workers. The
exit status is 1 unless each message ran once and in the order of its lane. deploy/PERFORMANCE.md has the figures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from tests.bench import machine
from tests.bench.bodies import of_size
from tests.bench.load import Sent
from tests.bench.targets import Database, Receiver, Server, Workbench, await_answer
from tests.support.waiting import until

TABLES = ("messages", "message_keys", "payloads", "deliveries", "delivery_attempts", "audit_events", "patient_digests")
RATES = (1, 100, 1_000, 10_000)
DESTINATIONS = 4
CONNECTIONS = 8  # of each destination
DAY = 86_400
_TIMEOUT = 600.0  # seconds

_SIZE = """
SELECT coalesce((SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('{table}')),
                pg_total_relation_size('{table}'))::bigint"""
# Attempts that are recorded before one of an older delivery of their lane, or are not the only one. In the order of
# their ids, because one statement ends a delivery and starts the next: the times are equal.
_WRONG = """
SELECT count(*) FROM (
    SELECT a.id, max(a.id) OVER (PARTITION BY d.lane ORDER BY d.id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
           AS before, d.attempts, d.state
    FROM deliveries d LEFT JOIN delivery_attempts a ON a.delivery_id = d.id) AS run
WHERE id IS NULL OR id < before OR attempts <> 1 OR state <> 'succeeded'"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one message: bytes on disk (with indexes) and rows by table, bytes of WAL, CPU seconds by process."""

    disk: dict[str, float]
    rows: dict[str, float]
    wal: float
    receiver: float
    worker: float
    postgres: float


def _worker(receiver: Receiver, number: int) -> Server:
    return Server(
        lambda _: [sys.executable, "-P", "-m", "receiver", "worker"],
        receiver.environment | {"RECEIVER_CONCURRENCY": "2"},
        receiver.root / f"worker-{number}.log",
    )


def _load(receiver: Receiver, servers: Sequence[Server], destinations: Sequence[str], seconds: float) -> list[Sent]:
    """Send to all destinations at once, half of them to each server."""
    targets = [
        receiver.target("receiver", servers[number % len(servers)], name) for number, name in enumerate(destinations)
    ]
    with ThreadPoolExecutor(len(targets)) as pool:
        return list(
            pool.map(
                lambda target: target.closed_loop(of_size("4 KB"), connections=CONNECTIONS, seconds=seconds), targets
            )
        )


def _sizes(database: Database) -> tuple[dict[str, int], dict[str, int], int]:
    return (
        {table: database.value(_SIZE.format(table=table)) for table in TABLES},
        {table: database.value(f"SELECT count(*) FROM {table}") for table in TABLES},
        database.value("SELECT (pg_current_wal_lsn() - '0/0')::bigint"),
    )


def measure(workbench: Workbench, *, receivers: int, workers: int, seconds: float) -> tuple[Cost, str, int]:
    """Return the cost of a message, a description of the run, and how many deliveries ran wrong."""
    receiver = workbench.receiver
    destinations = [f"clinic-{number}" for number in range(DESTINATIONS)]
    for name in destinations:
        receiver.add(name)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(receiver.serve(f"receiver-{number}", receivers="1")) for number in range(receivers)
        ]
        hands = [stack.enter_context(_worker(receiver, number)) for number in range(workers)]
        for server in servers:
            await_answer(receiver.target("receiver", server, destinations[0]))
        until(
            lambda: receiver.database.value("SELECT count(*) FROM workers") >= workers, seconds=_TIMEOUT, interval=0.1
        )
        _load(receiver, servers, destinations, 2.0)  # so that all processes have started
        until(lambda: not _pending(receiver), seconds=_TIMEOUT, interval=0.1)
        receiver.database.execute("CHECKPOINT")
        disk, rows, wal = _sizes(receiver.database)
        before = [machine.cpu_seconds(*(each.process.pid for each in group)) for group in (servers, hands)]
        postgres = workbench.database_cpu()
        began = time.monotonic()
        sent = _load(receiver, servers, destinations, seconds)
        accepted = time.monotonic() - began
        until(lambda: not _pending(receiver), seconds=_TIMEOUT, interval=0.1)
        handled = time.monotonic() - began
        until(
            lambda: not receiver.database.value("SELECT count(*) FROM messages WHERE patients_indexed_at IS NULL"),
            seconds=_TIMEOUT,
            interval=0.1,
        )
        after = [machine.cpu_seconds(*(each.process.pid for each in group)) for group in (servers, hands)]
        postgres = workbench.database_cpu() - postgres
        disk_after, rows_after, wal_after = _sizes(receiver.database)
    count = rows_after["messages"] - rows["messages"]
    wrong = receiver.database.value(_WRONG) + sum(each.wrong + each.broken for each in sent)
    cost = Cost(
        disk={table: (disk_after[table] - disk[table]) / count for table in TABLES},
        rows={table: (rows_after[table] - rows[table]) / count for table in TABLES},
        wal=(wal_after - wal) / count,
        receiver=(after[0] - before[0]) / count,
        worker=(after[1] - before[1]) / count,
        postgres=postgres / count,
    )
    words = (
        f"{receivers} receivers, {workers} workers: {count} messages, accepted at {count / accepted:.0f}/s, all "
        f"handled at {count / handled:.0f}/s; {wrong} wrong"
    )
    return cost, words, wrong


def _pending(receiver: Receiver) -> bool:
    return bool(receiver.database.value("SELECT EXISTS (SELECT FROM deliveries WHERE state = 'pending')"))


def table(cost: Cost) -> list[str]:
    """Return the lines of the table."""
    disk, rows = sum(cost.disk.values()), sum(cost.rows.values())
    lines = [
        "a message: "
        + ", ".join(f"{name} {cost.rows[name]:.2f} rows {size:.0f} B" for name, size in cost.disk.items()),
        (
            f"a message: {rows:.1f} rows, {disk:.0f} B on disk, {cost.wal:.0f} B of WAL; CPU ms: receiver "
            f"{cost.receiver * 1e3:.2f}, worker {cost.worker * 1e3:.2f}, PostgreSQL {cost.postgres * 1e3:.2f}"
        ),
        "messages/s  rows/day  disk/day  WAL/s  WAL/day  cores: receivers, workers, PostgreSQL",
    ]
    lines += [
        f"{rate:10,}  {rows * rate * DAY / 1e6:,.1f} M  {disk * rate * DAY / 1e9:,.2f} GB  "
        f"{cost.wal * rate / 1e6:,.2f} MB  {cost.wal * rate * DAY / 1e9:,.1f} GB  {cost.receiver * rate:.2f}, "
        f"{cost.worker * rate:.2f}, {cost.postgres * rate:.2f}"
        for rate in RATES
    ]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 1 if a delivery ran out of order, twice or never."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cost", description=__doc__)
    parser.add_argument("--receivers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="of sending")
    options = parser.parse_args(arguments)
    with Workbench() as workbench:
        cost, words, wrong = measure(
            workbench, receivers=options.receivers, workers=options.workers, seconds=options.seconds
        )
        print(words, *table(cost), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
