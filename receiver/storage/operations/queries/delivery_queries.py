"""Queries of deliveries and lanes."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, and_, case, exists, false, func, or_, select

from receiver.errors import NotFound
from receiver.states import DeliveryState, LaneState
from receiver.storage import schema
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.operations.queries.filters import DeliveryFilter
from receiver.storage.operations.queries.registry_queries import destination_named
from receiver.storage.operations.queries.rows import Mappings, mappings, shown
from receiver.storage.queue.outcomes import delivery_binding

_owner: Final = schema.destinations


def deliveries(connection: Connection, where: DeliveryFilter, *, before: int | None = None, limit: int) -> Mappings:
    """Return deliveries, newest first, with their message's uuid and kind. `running`: a worker runs it now.

    Raises NotFound for an unknown destination.
    """
    query = _delivery_query().where(*where.clauses(connection)).order_by(schema.deliveries.c.id.desc()).limit(limit)
    return mappings(connection, query if before is None else query.where(schema.deliveries.c.id < before))


def pending(connection: Connection) -> dict[tuple[str, str], int]:
    """Return (destination, handler) → number of pending deliveries."""
    table = schema.deliveries
    rows = connection.execute(
        select(_owner.c.name, table.c.handler, func.count())
        .join(_owner, _owner.c.id == table.c.destination_id)
        .where(table.c.state == DeliveryState.PENDING)
        .group_by(_owner.c.name, table.c.handler)
    )
    return {(name, handler): number for name, handler, number in rows}


def delivery(connection: Connection, number: int) -> dict[str, Any]:
    """Return one delivery, and as `delivery_attempts` its attempts in order, each with its frames. Raises NotFound."""
    table, attempts = schema.deliveries, schema.delivery_attempts
    found = mappings(connection, _delivery_query().where(table.c.id == number))
    if not found:
        raise NotFound(f"there is no delivery {number}: see `redox-receiver deliveries list`")
    return found[0] | {
        "delivery_attempts": mappings(
            connection, select(attempts).where(attempts.c.delivery_id == number).order_by(attempts.c.id)
        )
    }


def error_text(connection: Connection, seals: Sealer, number: int) -> str | None:
    """Return the opened text of a delivery's last error; None when none is stored. Raises IntegrityError."""
    table = schema.deliveries
    row = connection.execute(select(table.c.error_key, table.c.error_sealed).where(table.c.id == number)).one_or_none()
    if row is None or row.error_sealed is None:
        return None
    return seals.open(row.error_key, row.error_sealed, delivery_binding(number)).decode()


def _delivery_query() -> Select[Any]:
    table, lane, came = schema.deliveries, schema.lanes, schema.messages
    return (
        select(
            *shown(table),
            _owner.c.name.label("destination"),
            came.c.uuid.label("message_uuid"),
            came.c.kind,
            func.coalesce(_running(), false()).label("running"),
        )
        .join(_owner, _owner.c.id == table.c.destination_id)
        .join(came, and_(came.c.id == table.c.message_id, came.c.received_at == table.c.received_at))
        .outerjoin(lane, lane.c.lane == table.c.lane)
    )


def leased() -> ColumnElement[bool]:
    """Return the condition that a worker holds the lane (a row of `lanes`)."""
    return and_(schema.lanes.c.owner.is_not(None), schema.lanes.c.lease_until > func.now())


def _running() -> ColumnElement[bool]:
    """Return the condition that a worker runs the delivery (a row of `deliveries` joined with its lane's)."""
    table = schema.deliveries
    return and_(
        table.c.state == DeliveryState.PENDING,
        table.c.started_at.is_not(None),
        leased(),
        table.c.epoch == schema.lanes.c.epoch,
    )


def lanes(
    connection: Connection,
    *,
    handler: str | None = None,
    destination: str | None = None,
    state: str | None = None,
    limit: int,
) -> Mappings:
    """Return lanes with pending, running or held deliveries, the longest waiting first.

    Keys: lane, handler, destination, state (`running`, `held`, `paused`: its handler is; `waiting` until ready_at;
    `ready`), pending, head (the next delivery), oldest_pending_at, ready_at, owner, lease_until, epoch.
    """
    table, waits, bound = schema.lanes, schema.deliveries, schema.subscriptions
    pending = (
        select(
            waits.c.lane,
            waits.c.handler,
            waits.c.destination_id,
            func.count().label("pending"),
            func.min(waits.c.id).label("head"),
            func.min(waits.c.created_at).label("oldest_pending_at"),
        )
        .where(waits.c.state == DeliveryState.PENDING, ~waits.c.inline)
        .group_by(waits.c.lane, waits.c.handler, waits.c.destination_id)
        .subquery()
    )
    name, owner = (func.coalesce(pending.c[each], table.c[each]) for each in ("handler", "destination_id"))
    paused = exists().where(bound.c.handler == name, bound.c.destination_id == owner, bound.c.paused_at.is_not(None))
    shown_state = case(
        (leased(), "running"),
        (table.c.state == LaneState.HELD, LaneState.HELD.value),
        (or_(paused, table.c.state == LaneState.PAUSED), LaneState.PAUSED.value),
        else_=func.coalesce(table.c.state, LaneState.READY.value),
    )
    query = (
        select(
            func.coalesce(pending.c.lane, table.c.lane).label("lane"),
            name.label("handler"),
            _owner.c.name.label("destination"),
            shown_state.label("state"),
            func.coalesce(pending.c.pending, 0).label("pending"),
            pending.c.head,
            pending.c.oldest_pending_at,
            table.c.ready_at,
            table.c.owner,
            table.c.lease_until,
            table.c.epoch,
        )
        .select_from(pending.join(table, table.c.lane == pending.c.lane, full=True))
        .join(_owner, _owner.c.id == owner)
        .where(or_(pending.c.pending.is_not(None), table.c.state == LaneState.HELD, leased()))
        .order_by(pending.c.oldest_pending_at.asc().nulls_last(), func.coalesce(pending.c.lane, table.c.lane))
        .limit(limit)
    )
    if handler is not None:
        query = query.where(name == handler)
    if destination is not None:
        query = query.where(owner == destination_named(connection, destination)["id"])
    return mappings(connection, query if state is None else query.where(shown_state == state))
