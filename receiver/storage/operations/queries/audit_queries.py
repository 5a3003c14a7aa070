"""Queries of the audit log."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection, select

from receiver.errors import NotFound
from receiver.storage import schema
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.operations.queries.filters import AuditFilter
from receiver.storage.operations.queries.rows import Mappings, mappings, shown


def audit(connection: Connection, where: AuditFilter, *, before: int | None = None, limit: int) -> Mappings:
    """Return audit rows, newest first. `detail` is parsed; `noted`: an operator gave a reason (see `note`)."""
    table = schema.audit_events
    query = (
        select(*shown(table), table.c.note.is_not(None).label("noted"))
        .where(*where.clauses())
        .order_by(table.c.id.desc())
        .limit(limit)
    )
    found = mappings(connection, query if before is None else query.where(table.c.id < before))
    return [each | {"detail": each["detail"] and msgspec.json.decode(each["detail"])} for each in found]


def note(connection: Connection, seals: Sealer, number: int) -> str | None:
    """Return the opened reason of an audit row; None when none was given. Raises NotFound, IntegrityError."""
    table = schema.audit_events
    row = connection.execute(
        select(table.c.writer, table.c.n, table.c.note, table.c.note_key).where(table.c.id == number)
    ).one_or_none()
    if row is None:
        raise NotFound(f"there is no audit row {number}: see `redox-receiver audit list`")
    return None if row.note is None else seals.open(row.note_key, row.note, f"audit:{row.writer}:{row.n}").decode()
