"""Corrections of lanes: releases a held lane."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select, update

from receiver.errors import Conflict, NotFound
from receiver.states import LaneState
from receiver.storage import schema
from receiver.storage.evidence.audit_log import write
from receiver.storage.operations.corrections.batches import AuditedCorrections


class LaneCorrections(AuditedCorrections):
    """The corrections of lanes."""

    def release(self, name: str, now: datetime, *, reason: str | None) -> None:
        """Release a held lane: its first delivery runs once more. Raises NotFound, and Conflict when it is not held."""
        table = schema.lanes
        with self._transaction() as connection:
            row = connection.execute(
                select(table.c.state, schema.destinations.c.name)
                .join(schema.destinations, schema.destinations.c.id == table.c.destination_id)
                .where(table.c.lane == name)
                .with_for_update(of=table)
            ).one_or_none()
            if row is None:
                raise NotFound(f"no lane {name!r} ever ran: see `redox-receiver lanes list`")
            if row.state != LaneState.HELD:
                raise Conflict(f"lane {name} is not held but {row.state}: see `redox-receiver lanes list`")
            connection.execute(update(table).where(table.c.lane == name).values(state=LaneState.READY, ready_at=None))
            write(
                connection,
                self._audit,
                [
                    self._event(
                        "lane.release", LaneState.READY, now, reason, subject=f"lanes:{name}", destination=row.name
                    )
                ],
            )
