"""Queries for an export of the audit log: the sealed rows in the log's order, which never changes.

The cursor is the index of a row in the log (its Merkle leaf). It cannot be the id: a row with a smaller id may commit
later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import msgspec
from sqlalchemy import Connection

from receiver.errors import Conflict
from receiver.storage import schema
from receiver.storage.evidence.seals import SealBody
from receiver.storage.operations.queries.rows import shown

_AT_ONCE: Final = 1_000
_SHOWN: Final = tuple(column.name for column in shown(schema.audit_events))

# The keys of an exported row: the columns of `audit_events` that may be shown, and `noted`: an operator gave a reason.
EXPORT_COLUMNS: Final = ("log_index", *_SHOWN, "noted")

_LAST: Final = "SELECT n, size, body FROM audit_seals ORDER BY n DESC LIMIT 1"
_SIZE: Final = "SELECT size FROM audit_seals WHERE n >= %(n)s ORDER BY n LIMIT 1"
# Of rows with one number, the first is the sealed one: `audit verify` reports the others.
_ROWS: Final = f"""
SELECT DISTINCT ON (w.seal, w.first_leaf + e.n - w.first_n)
       w.first_leaf + e.n - w.first_n AS log_index, {", ".join(f"e.{name}" for name in _SHOWN)},
       e.note IS NOT NULL AS noted
FROM audit_seal_writers w JOIN audit_events e ON e.writer = w.writer AND e.n BETWEEN w.first_n AND w.last_n
WHERE w.seal BETWEEN %(first_seal)s AND %(last_seal)s
  AND w.first_leaf + e.n - w.first_n BETWEEN %(first)s AND %(last)s
ORDER BY w.seal, w.first_leaf + e.n - w.first_n, e.id"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRange:
    """Rows of the log from index `first` to `last`, both included. `log`: the log's identity."""

    log: UUID
    first: int
    last: int
    first_seal: int
    last_seal: int

    @property
    def count(self) -> int:
        """Return how many rows were sealed in this range."""
        return self.last - self.first + 1


def log_range(connection: Connection, *, after: int | None, limit: int | None) -> LogRange | None:
    """Return the range of sealed rows after index `after`; None when there is none.

    Raises Conflict when the log never had a row of that index.
    """
    newest = connection.exec_driver_sql(_LAST).one_or_none()
    size = 0 if newest is None else newest.size
    if after is not None and after >= size:
        raise Conflict(
            f"--after {after}: the log has {size} sealed rows. The cursor is from another database, or an older copy "
            "of this one was restored: run `redox-receiver audit verify`"
        )
    first = 0 if after is None else after + 1
    if newest is None or first == size:
        return None
    last = size - 1 if limit is None else min(size, first + limit) - 1
    return LogRange(
        log=SealBody.decode(newest.body).log,
        first=first,
        last=last,
        first_seal=_seal_of(connection, first, newest.n),
        last_seal=_seal_of(connection, last, newest.n),
    )


def export_rows(connection: Connection, wanted: LogRange) -> Iterator[dict[str, Any]]:
    """Yield the rows of the range in the log's order, with the keys of EXPORT_COLUMNS. `detail` is parsed.

    A row that was deleted is left out: compare the number of rows with `LogRange.count`.
    """
    bounds = {
        "first": wanted.first,
        "last": wanted.last,
        "first_seal": wanted.first_seal,
        "last_seal": wanted.last_seal,
    }
    with connection.exec_driver_sql(_ROWS, bounds, execution_options={"yield_per": _AT_ONCE}) as found:
        for row in found.mappings():
            yield {**row, "detail": row["detail"] and msgspec.json.decode(row["detail"])}


def _seal_of(connection: Connection, index: int, newest: int) -> int:
    """Return the number of the seal that added the row of that index: sizes grow with the numbers."""
    low, high = 1, newest
    while low < high:
        middle = (low + high) // 2
        if connection.exec_driver_sql(_SIZE, {"n": middle}).scalar_one() > index:
            high = middle
        else:
            low = middle + 1
    return low
