"""The commit horizon of a table: the id up to which every row is visible, or will never exist.

Ids are given before they are committed, so a row with a smaller id may become visible later. An INSERT locks its table
from before it takes an id until its transaction ends: when all that held the lock at some moment have ended, every id
that was given by then is decided.

Must not read rows.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection

_NEWEST: Final = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {table}_id_seq"
_HOLDERS: Final = """
SELECT virtualtransaction FROM pg_catalog.pg_locks
WHERE locktype = 'relation' AND relation = '{table}'::regclass AND mode = 'RowExclusiveLock' AND granted
  AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())"""


class CommitHorizon:
    """The horizon of one table. Each call of `advance` learns from the ones before. Not thread-safe."""

    def __init__(self, table: str) -> None:
        self._newest, self._holders = _NEWEST.format(table=table), _HOLDERS.format(table=table)
        # (newest id, transactions that may hold a smaller one), until all of those have ended.
        self._waiting: tuple[int, frozenset[str]] | None = None

    def advance(self, connection: Connection, known: int) -> int:
        """Return the horizon, at least `known`. It holds for the next statement of a READ COMMITTED transaction."""
        newest = int(connection.exec_driver_sql(self._newest).scalar_one())
        holders = frozenset(connection.exec_driver_sql(self._holders).scalars())
        if self._waiting is not None and not self._waiting[1] & holders:
            known, self._waiting = max(known, self._waiting[0]), None
        if not holders:
            return max(known, newest)
        if self._waiting is None:
            self._waiting = newest, holders
        return known
