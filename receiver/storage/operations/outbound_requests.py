"""Queries about requests to Redox: lists, single rows, and what waits or failed.

Must not write, nor return a body.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, and_, func, or_, select

from receiver.errors import NotFound
from receiver.states import DeliveryState, OutboxState
from receiver.storage import schema

_table: Final = schema.outbound_requests
_owner: Final = schema.destinations
_HIDDEN: Final = frozenset({"request", "request_key", "answer", "answer_key", "destination_id"})


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestFilter:
    """Selects requests: all given conditions must hold. `since`: ended (or if pending, created) then or later."""

    ids: tuple[int, ...] = ()
    api_key: str | None = None
    state: str | None = None
    call: str | None = None
    kind: str | None = None
    error_class: str | None = None
    since: datetime | None = None

    def clauses(self) -> list[ColumnElement[bool]]:
        """Return the conditions on `outbound_requests`."""
        found: list[ColumnElement[bool]] = [
            _table.c[name] == getattr(self, name)
            for name in ("api_key", "state", "call", "kind", "error_class")
            if getattr(self, name) is not None
        ]
        if self.ids:
            found.append(_table.c.id.in_(self.ids))
        if self.since is not None:
            found.append(func.coalesce(_table.c.finished_at, _table.c.created_at) >= self.since)
        return found

    @property
    def empty(self) -> bool:
        """Return whether no condition is given, so that every row would match."""
        return all(not getattr(self, each.name) for each in fields(self))


def requests(
    connection: Connection, where: RequestFilter, *, before: int | None = None, limit: int
) -> list[dict[str, Any]]:
    """Return requests, newest first, without their bodies. `sending`: an attempt is running now."""
    query = _query().where(*where.clauses()).order_by(_table.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(_table.c.id < before)
    return [dict(row) for row in connection.execute(query).mappings()]


def request(connection: Connection, number: int) -> dict[str, Any]:
    """Return one request, without its bodies. Raises NotFound."""
    row = connection.execute(_query().where(_table.c.id == number)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"there is no request {number}: see `redox-receiver outbox list`")
    return dict(row)


def _query() -> Select[Any]:
    lane = schema.lanes
    leased = and_(lane.c.owner.is_not(None), lane.c.lease_until > func.now(), lane.c.epoch == _table.c.epoch)
    shown = [column for column in _table.c if column.name not in _HIDDEN]
    sending = and_(_table.c.state == OutboxState.PENDING, _table.c.started_at.is_not(None), leased)
    return (
        select(*shown, _owner.c.name.label("destination"), func.coalesce(sending, False).label("sending"))
        .outerjoin(_owner, _owner.c.id == _table.c.destination_id)
        .outerjoin(lane, lane.c.lane == _table.c.lane)
    )


def problems(connection: Connection) -> list[dict[str, Any]]:
    """Return what is not sent: for each API key, state and error the count and the oldest. Omits what waits in turn."""
    stuck = or_(
        _table.c.state == OutboxState.HELD,
        and_(_table.c.state == OutboxState.PENDING, _table.c.error_class.is_not(None)),
        and_(_table.c.state == OutboxState.DEAD, _table.c.lane.is_not(None)),
    )
    what = (_table.c.api_key, _table.c.state, _table.c.error_class)
    return [
        dict(row)
        for row in connection.execute(
            select(*what, func.count().label("count"), func.min(_table.c.created_at).label("oldest_at"))
            .where(stuck)
            .group_by(*what)
            .order_by(*what)
        ).mappings()
    ]


def pending(connection: Connection) -> int:
    """Return how many requests wait to be sent."""
    return connection.scalar(select(func.count()).select_from(_table).where(_table.c.state == OutboxState.PENDING)) or 0


def waiting(connection: Connection, destination: str, keys: Sequence[str]) -> int:
    """Return how many deliveries of a destination, and requests with these keys, wait in total."""
    delivery = schema.deliveries
    deliveries = connection.scalar(
        select(func.count())
        .select_from(delivery)
        .join(_owner, _owner.c.id == delivery.c.destination_id)
        .where(delivery.c.state == DeliveryState.PENDING, _owner.c.name == destination)
    )
    sends = connection.scalar(
        select(func.count())
        .select_from(_table)
        .where(_table.c.state == OutboxState.PENDING, _table.c.api_key.in_(keys))
    )
    return (deliveries or 0) + (sends or 0)
