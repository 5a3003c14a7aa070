"""Corrections of requests to Redox: send them again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, select, update

from receiver.states import OutboxState
from receiver.storage import schema
from receiver.storage.evidence.audit_log import write
from receiver.storage.operations.corrections import batches
from receiver.storage.operations.corrections.batches import AuditedCorrections, CorrectionBatch, LeftUnchanged
from receiver.storage.operations.outbound_requests import RequestFilter

_AGAIN: Final[dict[str, Any]] = {
    "state": OutboxState.PENDING,
    "attempts": 0,
    "unanswered": 0,
    "ready_at": None,
    "started_at": None,
    "finished_at": None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestsRetried:
    """The result of `retry`: `done` ids, and `left`: id → why it was not changed."""

    done: tuple[int, ...]
    left: Mapping[int, str]


class RequestCorrections(AuditedCorrections):
    """The corrections of requests to Redox."""

    def retry(self, where: RequestFilter, now: datetime, *, reason: str, dry_run: bool = False) -> RequestsRetried:
        """Send again what is dead, or held since a restore, with a new set of attempts; what waits, at once.

        Named by id, a request may have any of the three states. Otherwise it is dead, unless `where.state` is given. It
        keeps its place in its lane, and its bytes.
        """
        chosen = where.clauses()
        if not where.ids and where.state is None:
            chosen.append(schema.outbound_requests.c.state == OutboxState.DEAD)

        def step(connection: Connection, after: int, _seen: Collection[str]) -> CorrectionBatch | None:
            rows = _locked(connection, chosen, after)
            return self._retry_batch(connection, rows, now, reason) if rows else None

        done: list[int] = []
        left: dict[int, str] = dict.fromkeys(where.ids, "is not there")
        for batch in self._batches(step, 0, dry_run):
            done += batch.done
            for number in batch.done:
                left.pop(number, None)
            left.update({each.id: each.why for each in batch.left})
        return RequestsRetried(done=tuple(done), left=left)

    def _retry_batch(
        self, connection: Connection, rows: Sequence[Row[Any]], now: datetime, reason: str
    ) -> CorrectionBatch:
        table = schema.outbound_requests
        left = tuple(LeftUnchanged(id=row.id, why=why) for row in rows if (why := _refused(row)) is not None)
        again = [row for row in rows if _refused(row) is None]
        # A pending request may be sent at this moment: only its pause ends.
        for pending, values in ((True, {"ready_at": None}), (False, _AGAIN)):
            ids = [row.id for row in again if (row.state == OutboxState.PENDING) is pending]
            connection.execute(update(table).values(values).where(table.c.id.in_(ids)))
        write(
            connection,
            self._audit,
            [
                self._event(
                    "outbound.retry",
                    OutboxState.PENDING,
                    now,
                    reason,
                    subject=f"outbound_requests:{row.id}",
                    destination=row.name,
                    message_uuid=row.message_uuid,
                    detail={"was": row.state, "error_class": row.error_class},
                )
                for row in again
            ],
        )
        return CorrectionBatch(done=tuple(row.id for row in again), left=left, last=rows[-1].id)


def _locked(connection: Connection, chosen: list[ColumnElement[bool]], after: int) -> Sequence[Row[Any]]:
    """Lock and return the next requests."""
    table, owner = schema.outbound_requests, schema.destinations
    return connection.execute(
        select(
            table.c.id,
            table.c.state,
            table.c.lane,
            table.c.error_class,
            table.c.message_uuid,
            table.c.request.is_(None).label("purged"),
            owner.c.name,
        )
        .outerjoin(owner, owner.c.id == table.c.destination_id)
        .where(*chosen, table.c.id > after)
        .order_by(table.c.id)
        .limit(batches.ROWS)
        .with_for_update(of=table)
    ).all()


def _refused(row: Row[Any]) -> str | None:
    """Return why a request cannot be sent again."""
    if row.lane is None:
        return "was a call that was made at once: its caller must make it again"
    if row.state == OutboxState.SENT:
        return "is sent already"
    return "is purged: nothing is left to send" if row.purged else None
