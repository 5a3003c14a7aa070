"""Requests to Redox, as operators see and correct them: lists, single rows, bodies, and sending again.

Must not send. Bodies contain patient data: they are opened for a reason, which is audited before they are returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Engine, Row, Select, and_, func, or_, select, update

from receiver.errors import Conflict, NotFound
from receiver.keyring import Keyring
from receiver.storage import schema
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.queue.outbox import answer_binding, request_binding

_table: Final = schema.outbound_requests
_owner: Final = schema.destinations
_HIDDEN: Final = frozenset({"request", "request_key", "answer", "answer_key", "destination_id"})
# How many rows are changed in one transaction.
_ROWS: Final = 500
_RETRY_VALUES: Final[dict[str, Any]] = {
    "state": "pending",
    "attempts": 0,
    "unanswered": 0,
    "ready_at": None,
    "started_at": None,
    "finished_at": None,
}


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Retried:
    """The result of `retry`: `done` ids, and `left`: id → why it was not changed."""

    done: tuple[int, ...]
    left: Mapping[int, str]


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
    sending = and_(_table.c.state == "pending", _table.c.started_at.is_not(None), leased)
    return (
        select(*shown, _owner.c.name.label("destination"), func.coalesce(sending, False).label("sending"))
        .outerjoin(_owner, _owner.c.id == _table.c.destination_id)
        .outerjoin(lane, lane.c.lane == _table.c.lane)
    )


class OutboundRecords:
    """Operations on requests. `actor`: the name in the audit log (USER@HOST)."""

    def __init__(self, engine: Engine, keyring: Keyring, *, actor: str) -> None:
        self._engine = engine
        self._seals = Sealer(keyring)
        self._audit = AuditChain(keyring, self._seals)
        self._actor = actor

    def retry(self, where: RequestFilter, now: datetime, *, reason: str, dry_run: bool = False) -> Retried:
        """Send again what is dead, or held since a restore, with a new set of attempts; what waits, at once.

        Named by id, a request may have any of the three states. Otherwise it is dead, unless `where.state` is given. It
        keeps its place in its lane, and its bytes.
        """
        chosen = where.clauses()
        if not where.ids and where.state is None:
            chosen.append(_table.c.state == "dead")
        done: list[int] = []
        left: dict[int, str] = dict.fromkeys(where.ids, "is not there")
        after = 0
        while True:
            with self._transaction(dry_run) as connection:
                rows = connection.execute(
                    select(
                        _table.c.id,
                        _table.c.state,
                        _table.c.lane,
                        _table.c.error_class,
                        _table.c.message_uuid,
                        _table.c.request.is_(None).label("purged"),
                        _owner.c.name,
                    )
                    .outerjoin(_owner, _owner.c.id == _table.c.destination_id)
                    .where(*chosen, _table.c.id > after)
                    .order_by(_table.c.id)
                    .limit(_ROWS)
                    .with_for_update(of=_table)
                ).all()
                refused = {row.id: why for row in rows if (why := _refused(row)) is not None}
                again = [row for row in rows if row.id not in refused]
                # A pending request may be sent at this moment: only its pause ends.
                for waits, values in ((True, {"ready_at": None}), (False, _RETRY_VALUES)):
                    connection.execute(
                        update(_table)
                        .values(values)
                        .where(_table.c.id.in_([row.id for row in again if (row.state == "pending") is waits]))
                    )
                write(
                    connection,
                    self._audit,
                    [
                        AuditEvent(
                            action="outbound.retry",
                            outcome="pending",
                            at=now,
                            actor=self._actor,
                            destination=row.name,
                            message_uuid=row.message_uuid,
                            subject=f"outbound_requests:{row.id}",
                            note=reason,
                            detail={"was": row.state, "error_class": row.error_class},
                        )
                        for row in again
                    ],
                )
            done += [row.id for row in again]
            left = {number: why for number, why in left.items() if number not in {row.id for row in rows}} | refused
            if len(rows) < _ROWS:
                return Retried(done=tuple(done), left=left)
            after = rows[-1].id

    def bodies(self, number: int, now: datetime, *, reason: str) -> tuple[bytes, bytes | None]:
        """Return (the stored request, the answer of Redox), after committing their audit row.

        Raises NotFound, IntegrityError, and Conflict when they are purged.
        """
        with self._transaction() as connection:
            row = connection.execute(
                select(_table, _owner.c.name)
                .outerjoin(_owner, _owner.c.id == _table.c.destination_id)
                .where(_table.c.id == number)
            ).one_or_none()
            if row is None:
                raise NotFound(f"there is no request {number}: see `redox-receiver outbox list`")
            if row.request is None:
                raise Conflict(f"the bodies of request {number} are purged; its row and its audit are what is left")
            sent = self._seals.open_body(row.request_key, row.request, request_binding(row.uuid, row.api_key))
            came = (
                None
                if row.answer is None
                else self._seals.open_body(row.answer_key, row.answer, answer_binding(row.uuid))
            )
            write(
                connection,
                self._audit,
                [
                    AuditEvent(
                        action="outbound.disclose",
                        outcome="disclosed",
                        at=now,
                        actor=self._actor,
                        destination=row.name,
                        message_uuid=row.message_uuid,
                        subject=f"outbound_requests:{number}",
                        note=reason,
                    )
                ],
            )
        return sent, came

    @contextmanager
    def _transaction(self, dry_run: bool = False) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection, connection.begin() as transaction:
                yield connection
                if dry_run:
                    transaction.rollback()
                    self._audit.restart()
        except BaseException:
            self._audit.restart()
            raise


def _refused(row: Row[Any]) -> str | None:
    """Return why a request cannot be sent again."""
    if row.lane is None:
        return "was a call that was made at once: its caller must make it again"
    if row.state == "sent":
        return "is sent already"
    return "is purged: nothing is left to send" if row.purged else None


def problems(connection: Connection) -> list[dict[str, Any]]:
    """Return what is not sent: for each API key, state and error the count and the oldest. Omits what waits in turn."""
    stuck = or_(
        _table.c.state == "held",
        and_(_table.c.state == "pending", _table.c.error_class.is_not(None)),
        and_(_table.c.state == "dead", _table.c.lane.is_not(None)),
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
    return connection.scalar(select(func.count()).select_from(_table).where(_table.c.state == "pending")) or 0


def waiting(connection: Connection, destination: str, keys: Sequence[str]) -> int:
    """Return how many deliveries of a destination, and requests with these keys, wait in total."""
    delivery = schema.deliveries
    deliveries = connection.scalar(
        select(func.count())
        .select_from(delivery)
        .join(_owner, _owner.c.id == delivery.c.destination_id)
        .where(delivery.c.state == "pending", _owner.c.name == destination)
    )
    sends = connection.scalar(
        select(func.count()).select_from(_table).where(_table.c.state == "pending", _table.c.api_key.in_(keys))
    )
    return (deliveries or 0) + (sends or 0)
