"""Corrections of deliveries: retry them, or skip them.

A delivery that a worker runs under a live lease is left alone. Later starts wait for the COMMIT, because starting locks
the delivery's row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, and_, or_, select, tuple_, update

from receiver.states import DeliveryState, LaneState
from receiver.storage import schema
from receiver.storage.evidence.audit_log import write
from receiver.storage.operations import queries
from receiver.storage.operations.corrections import batches
from receiver.storage.operations.corrections.batches import (
    AuditedCorrections,
    CorrectionBatch,
    CorrectionTask,
    LeftUnchanged,
    count_newer,
)
from receiver.storage.operations.queries import DeliveryFilter


@dataclass(frozen=True, kw_only=True, slots=True)
class _DeliveryChange:
    """The change that an operation makes to a delivery. `default`: the states that filters without a state mean.

    `refused`: the states that it cannot change, and why.
    """

    action: str
    values: Mapping[str, Any]
    default: tuple[DeliveryState, ...]
    refused: Mapping[str, str]
    finishes: bool = False


_RETRY: Final = _DeliveryChange(
    action="delivery.retry",
    default=(DeliveryState.DEAD,),
    # No request waits any more for a delivery that ran inline (acknowledge="after_handling").
    values={
        "state": DeliveryState.PENDING,
        "attempts": 0,
        "started_at": None,
        "ready_at": None,
        "deferred_since": None,
        "finished_at": None,
        "inline": False,
    },
    refused={DeliveryState.SUCCEEDED: "succeeded already: `messages replay` delivers its message again"},
)
_SKIP: Final = _DeliveryChange(
    action="delivery.skip",
    default=(DeliveryState.PENDING, DeliveryState.DEAD),
    values={"state": DeliveryState.SKIPPED, "started_at": None, "ready_at": None},
    refused={DeliveryState.SUCCEEDED: "succeeded already", DeliveryState.SKIPPED: "skipped already"},
    finishes=True,
)


class DeliveryCorrections(AuditedCorrections):
    """The corrections of deliveries."""

    def retry(self, where: DeliveryFilter, now: datetime, *, reason: str, dry_run: bool = False) -> CorrectionTask:
        """Run deliveries again, at their place in the lane, with their idempotency key and a new set of attempts.

        Named by id, they may be dead, skipped, or pending (and then no longer wait). Otherwise they are dead, unless
        `where.state` is given. Raises NotFound.
        """
        return self._change(where, _RETRY, now, reason, dry_run)

    def skip(self, where: DeliveryFilter, now: datetime, *, reason: str, dry_run: bool = False) -> CorrectionTask:
        """Skip pending or dead deliveries: their lane continues, even a held one. Raises NotFound."""
        return self._change(where, _SKIP, now, reason, dry_run)

    def _change(
        self, where: DeliveryFilter, change: _DeliveryChange, now: datetime, reason: str, dry_run: bool
    ) -> CorrectionTask:
        table = schema.deliveries

        def step(
            chosen: list[ColumnElement[bool]], connection: Connection, after: int, seen: Collection[str]
        ) -> CorrectionBatch | None:
            ids = connection.scalars(
                select(table.c.id).where(*chosen, table.c.id > after).order_by(table.c.id).limit(batches.ROWS)
            ).all()
            return self._change_batch(connection, ids, change, now, reason, seen) if ids else None

        return self._task(table, where, change.default, step, dry_run=dry_run)

    def _change_batch(
        self,
        connection: Connection,
        ids: Sequence[int],
        change: _DeliveryChange,
        now: datetime,
        reason: str,
        seen: Collection[str],
    ) -> CorrectionBatch:
        table = schema.deliveries
        rows = _locked(connection, ids)
        lanes = _lanes(connection, {row.lane for row in rows})
        left, done = [], []
        for row in rows:
            why = change.refused.get(row.state) or _running(row, lanes.get(row.lane))
            if why is None:
                done.append(row)
            else:
                left.append(LeftUnchanged(id=row.id, why=why))
        oldest: dict[str, int] = {}
        for row in done:
            oldest[row.lane] = min(row.message_id, oldest.get(row.lane, row.message_id))
        newer = count_newer(connection, oldest, seen)
        values = dict(change.values) | ({"finished_at": now} if change.finishes else {})
        connection.execute(update(table).where(table.c.id.in_([row.id for row in done])).values(values))
        _wake_stopped(connection, done)
        write(
            connection,
            self._audit,
            [
                self._event(
                    change.action,
                    change.values["state"],
                    now,
                    reason,
                    subject=f"deliveries:{row.id}",
                    destination=row.destination,
                    message_uuid=row.uuid,
                    detail={"was": row.state, "error_class": row.error_class, "generation": row.generation},
                )
                for row in done
            ],
        )
        return CorrectionBatch(
            done=tuple(row.id for row in done), left=tuple(left), last=ids[-1], lanes=tuple(oldest), newer=newer
        )


def _locked(connection: Connection, ids: Sequence[int]) -> Sequence[Any]:
    """Lock and return the deliveries."""
    table, message = schema.deliveries, schema.messages
    return connection.execute(
        select(
            table.c.id,
            table.c.message_id,
            table.c.generation,
            table.c.lane,
            table.c.state,
            table.c.epoch,
            table.c.started_at,
            table.c.error_class,
            message.c.uuid,
            schema.destinations.c.name.label("destination"),
        )
        .join(message, and_(message.c.id == table.c.message_id, message.c.received_at == table.c.received_at))
        .join(schema.destinations, schema.destinations.c.id == table.c.destination_id)
        .where(table.c.id.in_(ids))
        .order_by(table.c.id)
        .with_for_update(of=table)
    ).all()


def _lanes(connection: Connection, names: Collection[str]) -> dict[str, Any]:
    """Return the rows of the lanes. A lane without a row has never run.

    Must be read after the deliveries are locked, so that every attempt begun before is seen.
    """
    table = schema.lanes
    return {
        row.lane: row
        for row in connection.execute(
            select(table.c.lane, table.c.epoch, queries.leased().label("leased")).where(table.c.lane.in_(names))
        )
    }


def _running(row: Any, lane: Any) -> str | None:
    """Return why the delivery cannot be changed: a worker runs it, under the lease of this epoch."""
    started = row.state == DeliveryState.PENDING and row.started_at is not None
    if started and lane and lane.leased and lane.epoch == row.epoch:
        return f"is running now, in lane {lane.lane}: try again when it has ended"
    return None


def _wake_stopped(connection: Connection, rows: Sequence[Any]) -> None:
    """Wake the lanes that stopped at these deliveries: held under the epoch of one, or waiting for a time."""
    table = schema.lanes
    connection.execute(
        update(table)
        .where(
            ~queries.leased(),
            or_(
                and_(table.c.state == LaneState.WAITING, table.c.lane.in_({row.lane for row in rows})),
                and_(
                    table.c.state == LaneState.HELD,
                    tuple_(table.c.lane, table.c.epoch).in_(
                        {(row.lane, row.epoch) for row in rows if row.epoch is not None}
                    ),
                ),
            ),
        )
        .values(state=LaneState.READY, ready_at=None)
    )
