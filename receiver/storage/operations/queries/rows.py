"""Shared parts of the queries: rows as dicts, hidden columns, and how long a worker may be silent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, Table, exists, func

from receiver.storage import schema

Mappings = list[dict[str, Any]]

# A worker sends a heartbeat every few seconds. One that is silent for this long counts as dead.
WORKER_SILENT: Final = timedelta(seconds=60)

# Summary rows are written up to a minute late: the latest is among this many of the newest rows.
LATEST: Final = 2_000

# What happened within this time is recent.
RECENT: Final = timedelta(minutes=5)

_HIDDEN: Final = frozenset(
    {
        "mac",
        "mac_key",
        "digest",
        "secret",
        "secret_key",
        "error_sealed",
        "error_key",
        "note",
        "note_key",
        "destination_id",
        "patients_indexed_at",
    }
)


def equal(where: object, table: Table, names: Iterable[str]) -> list[ColumnElement[bool]]:
    """Return a condition for each of the fields `names` that `where` gives."""
    return [table.c[name] == getattr(where, name) for name in names if getattr(where, name) is not None]


def shown(table: Table) -> list[ColumnElement[Any]]:
    """Return the columns that may be shown."""
    return [column for column in table.c if column.name not in _HIDDEN]


def mappings(connection: Connection, query: Select[Any]) -> Mappings:
    """Return the rows of a query as dicts."""
    return [dict(row) for row in connection.execute(query).mappings()]


def mappings_of(connection: Connection, statement: str, values: Mapping[str, Any]) -> Mappings:
    """Return the rows of an SQL text as dicts."""
    return [dict(row) for row in connection.exec_driver_sql(statement, dict(values)).mappings()]


def loaded(handler: ColumnElement[Any]) -> ColumnElement[bool]:
    """Return the condition that a live worker has loaded the handler."""
    table = schema.workers
    return exists().where(table.c.seen_at > func.now() - WORKER_SILENT, handler == table.c.handlers.any_())
