"""Gauges of a machine: its processes by role, and its database. Only reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil
import psycopg
from sqlalchemy import make_url

from tests.faults.series import Series
from tests.support.machine import Machine

MIB: Final = 1024.0 * 1024.0
# Tables to which every message adds rows, until they are purged.
DESIGNED: Final = frozenset(
    {
        "messages",
        "message_keys",
        "payloads",
        "patient_digests",
        "deliveries",
        "delivery_attempts",
        "audit_events",
        "outbound_requests",
        "seen_once",
        "booked",
    }
)
_SERVER_ROLE: Final = "PostgreSQL"

# Partitions count for their table.
_SIZES: Final = """
SELECT coalesce((SELECT relname FROM pg_class WHERE oid = pg_partition_root(c.oid)), c.relname) AS name,
       sum(pg_table_size(c.oid))::float8 AS heap, sum(pg_indexes_size(c.oid))::float8 AS indexes,
       sum(coalesce(s.n_dead_tup, 0))::float8 AS dead, sum(coalesce(s.n_live_tup, 0))::float8 AS live
FROM pg_class c LEFT JOIN pg_stat_user_tables s ON s.relid = c.oid
WHERE c.relkind = 'r' AND c.relnamespace IN ('public'::regnamespace, 'procrastinate'::regnamespace)
GROUP BY 1"""
_SERVER: Final = """
SELECT count(*)::float8 AS connections,
       coalesce(max(extract(epoch FROM now() - xact_start)), 0)::float8 AS oldest,
       coalesce(max(age(backend_xmin)), 0)::float8 AS horizon,
       (SELECT count(*) FROM pg_replication_slots)::float8 AS slots,
       (SELECT count(*) FROM procrastinate.procrastinate_jobs)::float8 AS jobs,
       (SELECT count(*) FROM deliveries WHERE state = 'pending')::float8 AS pending,
       (SELECT count(*) FROM messages)::float8 AS messages,
       (SELECT count(*) FROM audit_events)::float8 AS audit,
       pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8 AS wal
FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"""


class Gauges:
    """All measured quantities of a machine on which `up` runs. `read` adds a measurement to each series."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.series: dict[str, Series] = {}
        url = make_url(machine.cluster.url).set(drivername="postgresql").render_as_string()
        self._connection = psycopg.connect(url, autocommit=True, row_factory=psycopg.rows.dict_row)
        self._wal: tuple[float, float] | None = None

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def read(self, now: float) -> None:
        """Measure all quantities at `now` (seconds)."""
        for name, unit, tolerance, value in self._processes():
            self._add(name, unit, tolerance, now, value)
        row = self._row(_SERVER)
        if self._wal is not None:
            then, position = self._wal
            # The rate follows the checkpoints: after each one, PostgreSQL writes whole pages.
            self._add("WAL rate", "KiB/s", 1_000, now, (row["wal"] - position) / (now - then) / 1024)
        self._wal = now, row["wal"]
        self._add("database connections", "", 6, now, row["connections"])
        self._add("oldest transaction", "s", 5, now, row["oldest"])
        self._add("transactions behind the oldest snapshot", "", 500, now, row["horizon"])
        self._add("replication slots", "", 0, now, row["slots"])
        self._add("jobs", "", 20, now, row["jobs"])
        self._add("pending deliveries", "", 100, now, row["pending"])
        self._add("messages", "", 0, now, row["messages"], designed=True)
        self._add("audit rows", "", 0, now, row["audit"], designed=True)
        for table in self._connection.execute(_SIZES).fetchall():
            name, designed = table["name"], table["name"] in DESIGNED
            self._add(f"table {name}", "KiB", 512, now, table["heap"] / 1024, designed=designed)
            self._add(f"indexes of {name}", "KiB", 512, now, table["indexes"] / 1024, designed=designed)
            # For tables that grow, measure the share of dead rows. Below a thousand rows it says nothing.
            total = table["dead"] + table["live"]
            if designed:
                self._add(f"dead in {name}", "%", 15, now, 100 * table["dead"] / total if total >= 1_000 else 0.0)
            else:
                self._add(f"dead in {name}", "rows", 3_000, now, table["dead"])

    def count(self, table: str) -> int:
        """Return the number of rows of a table."""
        return int(self._row(f"SELECT count(*) AS n FROM {table}")["n"])

    def updates(self) -> list[dict[str, Any]]:
        """Return the updates, HOT updates (within the page) and vacuums of each table that is updated."""
        return self._connection.execute(
            "SELECT relname AS name, n_tup_upd AS updates, n_tup_hot_upd AS hot, autovacuum_count AS vacuums "
            "FROM pg_stat_user_tables WHERE n_tup_upd > 100 ORDER BY n_tup_upd DESC"
        ).fetchall()

    def _row(self, query: str) -> dict[str, Any]:
        row = self._connection.execute(query).fetchone()
        assert row is not None
        return row

    def _add(self, name: str, unit: str, tolerance: float, now: float, value: float, *, designed: bool = False) -> None:
        self.series.setdefault(name, Series(name=name, unit=unit, tolerance=tolerance, designed=designed)).add(
            now, value
        )

    def _processes(self) -> Iterator[tuple[str, str, float, float]]:
        """Yield (series, unit, tolerance, value) for each role: the sum over its processes."""
        sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
        for role, process in self._roles():
            with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                found = (_memory(process.pid), process.num_fds(), process.num_threads(), 1)
                sums[role] = [a + b for a, b in zip(sums[role], found, strict=True)]
        for role, (memory, descriptors, threads, number) in sorted(sums.items()):
            # PostgreSQL has a process for each connection, and pools open connections on demand, up to a bound. It
            # caches open files.
            postgres = role == _SERVER_ROLE
            yield f"memory of {role}", "MiB", 16.0 if postgres else 4.0, memory / MIB
            yield f"processes of {role}", "", 6.0 if postgres else 1.0, number
            if not postgres:
                yield f"descriptors of {role}", "", 6.0, descriptors
                yield f"threads of {role}", "", 3.0, threads

    def _roles(self) -> Iterator[tuple[str, psutil.Process]]:
        assert self._machine.process is not None
        yield "up", psutil.Process(self._machine.process.pid)
        for part, role in (("receiver", "receiver"), ("admin", "admin"), ("worker-1", "worker")):
            with suppress(psutil.NoSuchProcess):
                head = psutil.Process(self._machine.part(part))
                yield role, head
                for child in head.children(recursive=True):
                    runs_handlers = "receiver.worker.handler_process" in child.cmdline()
                    yield f"{role}'s handler processes" if runs_handlers else role, child
        postmaster = self._machine.cluster.pid()
        if postmaster is not None:
            head = psutil.Process(postmaster)
            yield _SERVER_ROLE, head
            for child in head.children():
                yield _SERVER_ROLE, child


def _memory(pid: int) -> float:
    """Return the proportional set size in bytes, without shared memory: PostgreSQL's buffers have a fixed size."""
    fields = {}
    for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = row.partition(":")
        if rest.endswith("kB"):
            fields[name] = float(rest.split()[0]) * 1024
    return fields["Pss"] - fields.get("Pss_Shmem", 0.0)
