"""Queries of running processes: workers and receivers."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, func, select

from receiver.storage import schema
from receiver.storage.operations.queries.rows import WORKER_SILENT, Mappings, mappings, mappings_of


def workers(connection: Connection) -> Mappings:
    """Return delivery workers. `alive`: seen within WORKER_SILENT."""
    table = schema.workers
    return mappings(
        connection,
        select(*table.c, (table.c.seen_at > func.now() - WORKER_SILENT).label("alive")).order_by(table.c.name),
    )


def listeners(connection: Connection) -> Mappings:
    """Return the hosts and the addresses that they serve, for each role (`receiver`, `admin`).

    Keys: role, host, address, alive, processes (how many run), started_at (the newest), seen_at (last, or stopped),
    stopped (the last one ended in order).
    """
    return mappings_of(connection, _LISTENERS, {"silent": WORKER_SILENT})


_LISTENERS: Final = """
WITH each AS (
    SELECT *, coalesce(stopped_at, seen_at) AS last, stopped_at IS NULL AND seen_at > now() - %(silent)s AS alive
    FROM listeners)
SELECT role, host, address, bool_or(alive) AS alive, count(*) FILTER (WHERE alive) AS processes,
       max(started_at) AS started_at, max(last) AS seen_at,
       (array_agg(stopped_at IS NOT NULL ORDER BY last DESC))[1] AS stopped
FROM each GROUP BY role, host, address ORDER BY role DESC, host, address"""
