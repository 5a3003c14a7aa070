"""Queries for operators: lists, single rows, and the state of feeds.

Must not write, nor return a digest, a secret or a sealed text, except from `payload`, `error_text` and `note`, whose
callers have audited it. Lists are newest first, one page at a time by id (`before`), because offsets would shift while
a list grows. Rows are dicts. Their keys are the tables' columns, with `destination` (its name) for `destination_id`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Table,
    Text,
    and_,
    case,
    cast,
    exists,
    false,
    func,
    literal,
    null,
    or_,
    select,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB

from receiver.errors import IntegrityError, NotFound
from receiver.protocol.sources import ID_SHAPE
from receiver.storage import schema
from receiver.storage.evidence.audit_log import AUTHENTIC_REASONS
from receiver.storage.evidence.encryption import Sealer, payload_binding
from receiver.storage.queue.lanes import delivery_binding

Mappings = list[dict[str, Any]]

# A worker sends a heartbeat every few seconds. One that is silent for this long counts as dead.
WORKER_SILENT: Final = timedelta(seconds=60)

# Summary rows are written up to a minute late: the latest is among this many of the newest rows.
_LATEST: Final = 2_000
# What happened within this time is recent.
RECENT: Final = timedelta(minutes=5)
_SOURCE_REASONS: Final = ("source_unknown", "source_missing", "source_disabled")

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

_owner: Final = schema.destinations


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageFilter:
    """Selects messages: all given conditions must hold. `ids` are ids or uuids. `since` and `until`: when received."""

    ids: tuple[int | UUID, ...] = ()
    destination: str | None = None
    kind: str | None = None
    source_id: str | None = None
    state: str | None = None
    quarantine_reason: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def clauses(self, connection: Connection) -> list[ColumnElement[bool]]:
        """Return the conditions on `messages`. Raises NotFound for an unknown destination."""
        table = schema.messages
        found = _equal(self, table, ("kind", "source_id", "state", "quarantine_reason"))
        if self.ids:
            found.append(
                or_(
                    table.c.id.in_([each for each in self.ids if isinstance(each, int)]),
                    table.c.uuid.in_([each for each in self.ids if isinstance(each, UUID)]),
                )
            )
        if self.destination is not None:
            found.append(table.c.destination_id == destination_named(connection, self.destination)["id"])
        if self.since is not None:
            found.append(table.c.received_at >= self.since)
        if self.until is not None:
            found.append(table.c.received_at <= self.until)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class DeliveryFilter:
    """Selects deliveries: all given conditions must hold. `since`, `until`: when finished (or if pending, created)."""

    ids: tuple[int, ...] = ()
    destination: str | None = None
    handler: str | None = None
    state: str | None = None
    error_class: str | None = None
    lane: str | None = None
    message_id: int | None = None
    since: datetime | None = None
    until: datetime | None = None

    def clauses(self, connection: Connection) -> list[ColumnElement[bool]]:
        """Return the conditions on `deliveries`. Raises NotFound for an unknown destination."""
        table = schema.deliveries
        found = _equal(self, table, ("handler", "state", "error_class", "lane", "message_id"))
        if self.ids:
            found.append(table.c.id.in_(self.ids))
        if self.destination is not None:
            found.append(table.c.destination_id == destination_named(connection, self.destination)["id"])
        if self.since is not None:
            found.append(func.coalesce(table.c.finished_at, table.c.created_at) >= self.since)
        if self.until is not None:
            found.append(func.coalesce(table.c.finished_at, table.c.created_at) <= self.until)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditFilter:
    """Selects audit rows: all given conditions must hold. `action` is subject.verb, or a subject for all its verbs."""

    action: str | None = None
    outcome: str | None = None
    reason: str | None = None
    actor: str | None = None
    destination: str | None = None
    message_uuid: UUID | None = None
    subject: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def clauses(self) -> list[ColumnElement[bool]]:
        """Return the conditions on `audit_events`."""
        table = schema.audit_events
        found = _equal(self, table, ("outcome", "reason", "actor", "destination", "message_uuid", "subject"))
        if self.action is not None:
            found.append(
                table.c.action == self.action
                if "." in self.action
                else table.c.action.startswith(f"{self.action}.", autoescape=True)
            )
        if self.since is not None:
            found.append(table.c.at >= self.since)
        if self.until is not None:
            found.append(table.c.at <= self.until)
        return found


def empty(where: MessageFilter | DeliveryFilter) -> bool:
    """Return whether no condition is given, so that every row would match."""
    return all(not getattr(where, each.name) for each in fields(where))


def _equal(where: object, table: Table, names: Iterable[str]) -> list[ColumnElement[bool]]:
    return [table.c[name] == getattr(where, name) for name in names if getattr(where, name) is not None]


def _shown(table: Table) -> list[ColumnElement[Any]]:
    return [column for column in table.c if column.name not in _HIDDEN]


def _mappings(connection: Connection, query: Select[Any]) -> Mappings:
    return [dict(row) for row in connection.execute(query).mappings()]


# --- the registry


def destination_named(connection: Connection, name: str) -> dict[str, Any]:
    """Return one destination. Raises NotFound."""
    found = _mappings(connection, select(*_shown(_owner)).where(_owner.c.name == name))
    if not found:
        raise NotFound(f"there is no destination {name!r}: see `redox-receiver destination list`")
    return found[0]


def destinations(connection: Connection) -> Mappings:
    """Return all destinations, by name."""
    return _mappings(connection, select(*_shown(_owner)).order_by(_owner.c.name))


def credentials(connection: Connection, *, destination: str | None = None) -> Mappings:
    """Return credentials, without digests or secrets. `live`: it is valid now."""
    table = schema.credentials
    live = and_(
        or_(table.c.revoked_at.is_(None), table.c.revoked_at > func.now()),
        or_(table.c.expires_at.is_(None), table.c.expires_at > func.now()),
    )
    return _mappings(connection, _owned(connection, table, destination, live.label("live")))


def sources(connection: Connection, *, destination: str | None = None) -> Mappings:
    """Return registered sources. `source_id` null: messages that name none."""
    return _mappings(connection, _owned(connection, schema.sources, destination))


def subscriptions(connection: Connection, *, destination: str | None = None) -> Mappings:
    """Return handlers bound to destinations. `loaded`: a live worker has it."""
    table = schema.subscriptions
    return _mappings(connection, _owned(connection, table, destination, _loaded(table.c.handler).label("loaded")))


def keys(connection: Connection) -> Mappings:
    """Return the keys that the database was written with: id, purpose, fingerprint, created_at."""
    return _mappings(connection, select(schema.keys).order_by(schema.keys.c.created_at, schema.keys.c.id))


def _owned(connection: Connection, table: Table, owner: str | None, *more: ColumnElement[Any]) -> Select[Any]:
    """Return the rows of a registry table with their destination's name; only those of `owner`, if given."""
    query = (
        select(_owner.c.name.label("destination"), *_shown(table), *more)
        .join(_owner, _owner.c.id == table.c.destination_id)
        .order_by(_owner.c.name, table.c.id)
    )
    return query if owner is None else query.where(_owner.c.id == destination_named(connection, owner)["id"])


def refused_sources(
    connection: Connection, *, destination: str | None = None, since: datetime | None = None, limit: int
) -> Mappings:
    """Return sources of refused or quarantined messages that are still not registered.

    Keys: destination, source_id (null: none named, or not shaped like an id), source_sha256 (of a value not shaped like
    an id), reason, count, first_at, last_at, several (a flood of sources, not listed one by one), and `add`: the
    arguments of `source add` that register it, or null. Sources seen more than once come first, because a made-up one
    comes once.
    """
    audit, table = schema.audit_events, schema.messages
    detail = cast(audit.c.detail, JSONB)
    refused = select(
        audit.c.destination,
        detail["source"].astext.label("source_id"),
        detail["source_sha256"].astext.label("source_sha256"),
        audit.c.reason,
        audit.c.at,
        audit.c.count,
        func.coalesce(detail["several"].as_boolean(), false()).label("several"),
    ).where(audit.c.action == "message.refuse", audit.c.reason.in_(_SOURCE_REASONS))
    kept = (
        select(
            _owner.c.name,
            table.c.source_id,
            cast(null(), Text),
            table.c.quarantine_reason,
            table.c.received_at,
            literal(1),
            false(),
        )
        .join(_owner, _owner.c.id == table.c.destination_id)
        .where(table.c.state == "quarantined", table.c.quarantine_reason.in_(_SOURCE_REASONS))
    )
    if destination is not None:
        owner = destination_named(connection, destination)
        refused, kept = refused.where(audit.c.destination == destination), kept.where(_owner.c.id == owner["id"])
    if since is not None:
        refused, kept = refused.where(audit.c.at >= since), kept.where(table.c.received_at >= since)
    seen = union_all(refused, kept).subquery()
    known = exists().where(
        schema.sources.c.enabled,
        schema.sources.c.destination_id == _owner.c.id,
        _owner.c.name == seen.c.destination,
        schema.sources.c.source_id.is_not_distinct_from(seen.c.source_id),
    )
    what = (seen.c.destination, seen.c.source_id, seen.c.source_sha256, seen.c.reason, seen.c.several)
    counted, last = func.sum(seen.c.count), func.max(seen.c.at)
    found = _mappings(
        connection,
        select(*what, counted.label("count"), func.min(seen.c.at).label("first_at"), last.label("last_at"))
        .where(or_(seen.c.several, seen.c.source_sha256.is_not(None), ~known))
        .group_by(*what)
        .order_by(and_(counted > 1, ~seen.c.several).desc(), last.desc())
        .limit(limit),
    )
    return [each | {"add": _adding(each)} for each in found]


def _adding(seen: Mapping[str, Any]) -> str | None:
    """Return the arguments, safe to paste: only values shaped like an id, and no id that reads as an option."""
    source_id = seen["source_id"]
    if source_id is None:
        return None if seen["several"] or seen["source_sha256"] is not None else f"{seen['destination']} --none"
    if not ID_SHAPE.fullmatch(source_id):
        return None
    return f"{seen['destination']} {'-- ' if source_id.startswith('-') else ''}{source_id}"


# --- messages and deliveries

_message_columns: Final = [*_shown(schema.messages), _owner.c.name.label("destination")]


def messages(connection: Connection, where: MessageFilter, *, before: int | None = None, limit: int) -> Mappings:
    """Return messages, newest first. Raises NotFound for an unknown destination."""
    table = schema.messages
    query = (
        select(*_message_columns)
        .join(_owner, _owner.c.id == table.c.destination_id)
        .where(*where.clauses(connection))
        .order_by(table.c.id.desc())
        .limit(limit)
    )
    return _mappings(connection, query if before is None else query.where(table.c.id < before))


def message(connection: Connection, number: int | UUID) -> dict[str, Any]:
    """Return one message by id or uuid. `payload`: its bytes are still stored. Raises NotFound."""
    table, kept = schema.messages, schema.payloads
    found = _mappings(
        connection,
        select(
            *_message_columns,
            exists().where(kept.c.message_id == table.c.id, kept.c.received_at == table.c.received_at).label("payload"),
        )
        .join(_owner, _owner.c.id == table.c.destination_id)
        .where(table.c.uuid == number if isinstance(number, UUID) else table.c.id == number),
    )
    if not found:
        raise NotFound(f"there is no message {number}: see `redox-receiver messages list`")
    return found[0]


def payload(connection: Connection, seals: Sealer, found: Mapping[str, Any]) -> bytes | None:
    """Return the exact bytes of a message (a row with id, uuid, received_at, sha256); None when they are purged.

    Raises IntegrityError when they differ from what was received.
    """
    table = schema.payloads
    row = connection.execute(
        select(table.c.payload_key, table.c.sealed).where(
            table.c.message_id == found["id"], table.c.received_at == found["received_at"]
        )
    ).one_or_none()
    if row is None:
        return None
    body = seals.open_body(row.payload_key, row.sealed, payload_binding(str(found["uuid"])))
    if sha256(body).digest() != found["sha256"]:
        raise IntegrityError(
            f"the payload of message {found['id']} is not what was received: run `redox-receiver audit verify`"
        )
    return body


def deliveries(connection: Connection, where: DeliveryFilter, *, before: int | None = None, limit: int) -> Mappings:
    """Return deliveries, newest first, with their message's uuid and kind. `running`: a worker runs it now.

    Raises NotFound for an unknown destination.
    """
    query = _delivery_query().where(*where.clauses(connection)).order_by(schema.deliveries.c.id.desc()).limit(limit)
    return _mappings(connection, query if before is None else query.where(schema.deliveries.c.id < before))


def pending(connection: Connection) -> dict[tuple[str, str], int]:
    """Return (destination, handler) → number of pending deliveries."""
    table = schema.deliveries
    rows = connection.execute(
        select(_owner.c.name, table.c.handler, func.count())
        .join(_owner, _owner.c.id == table.c.destination_id)
        .where(table.c.state == "pending")
        .group_by(_owner.c.name, table.c.handler)
    )
    return {(name, handler): number for name, handler, number in rows}


def delivery(connection: Connection, number: int) -> dict[str, Any]:
    """Return one delivery, and as `delivery_attempts` its attempts in order, each with its frames. Raises NotFound."""
    table, attempts = schema.deliveries, schema.delivery_attempts
    found = _mappings(connection, _delivery_query().where(table.c.id == number))
    if not found:
        raise NotFound(f"there is no delivery {number}: see `redox-receiver deliveries list`")
    return found[0] | {
        "delivery_attempts": _mappings(
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
            *_shown(table),
            _owner.c.name.label("destination"),
            came.c.uuid.label("message_uuid"),
            came.c.kind,
            func.coalesce(_running(), false()).label("running"),
        )
        .join(_owner, _owner.c.id == table.c.destination_id)
        .join(came, came.c.id == table.c.message_id)
        .outerjoin(lane, lane.c.lane == table.c.lane)
    )


def leased() -> ColumnElement[bool]:
    """Return the condition that a worker holds the lane (a row of `lanes`)."""
    return and_(schema.lanes.c.owner.is_not(None), schema.lanes.c.lease_until > func.now())


def _running() -> ColumnElement[bool]:
    """Return the condition that a worker runs the delivery (a row of `deliveries` joined with its lane's)."""
    table = schema.deliveries
    return and_(
        table.c.state == "pending", table.c.started_at.is_not(None), leased(), table.c.epoch == schema.lanes.c.epoch
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
        .where(waits.c.state == "pending", ~waits.c.inline)
        .group_by(waits.c.lane, waits.c.handler, waits.c.destination_id)
        .subquery()
    )
    name, owner = (func.coalesce(pending.c[each], table.c[each]) for each in ("handler", "destination_id"))
    paused = exists().where(bound.c.handler == name, bound.c.destination_id == owner, bound.c.paused_at.is_not(None))
    shown_state = case(
        (leased(), "running"),
        (table.c.state == "held", "held"),
        (or_(paused, table.c.state == "paused"), "paused"),
        else_=func.coalesce(table.c.state, "ready"),
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
        .where(or_(pending.c.pending.is_not(None), table.c.state == "held", leased()))
        .order_by(pending.c.oldest_pending_at.asc().nulls_last(), func.coalesce(pending.c.lane, table.c.lane))
        .limit(limit)
    )
    if handler is not None:
        query = query.where(name == handler)
    if destination is not None:
        query = query.where(owner == destination_named(connection, destination)["id"])
    return _mappings(connection, query if state is None else query.where(shown_state == state))


def workers(connection: Connection) -> Mappings:
    """Return delivery workers. `alive`: seen within WORKER_SILENT."""
    table = schema.workers
    return _mappings(
        connection,
        select(*table.c, (table.c.seen_at > func.now() - WORKER_SILENT).label("alive")).order_by(table.c.name),
    )


def listeners(connection: Connection) -> Mappings:
    """Return the hosts and the addresses that they serve, for each role (`receiver`, `admin`).

    Keys: role, host, address, alive, processes (how many run), started_at (the newest), seen_at (last, or stopped),
    stopped (the last one ended in order).
    """
    return _mappings_of(connection, _LISTENERS, {"silent": WORKER_SILENT})


_LISTENERS: Final = """
WITH each AS (
    SELECT *, coalesce(stopped_at, seen_at) AS last, stopped_at IS NULL AND seen_at > now() - %(silent)s AS alive
    FROM listeners)
SELECT role, host, address, bool_or(alive) AS alive, count(*) FILTER (WHERE alive) AS processes,
       max(started_at) AS started_at, max(last) AS seen_at,
       (array_agg(stopped_at IS NOT NULL ORDER BY last DESC))[1] AS stopped
FROM each GROUP BY role, host, address ORDER BY role DESC, host, address"""


def feed_activity(connection: Connection, history: timedelta) -> dict[str, dict[str, Any]]:
    """Return when messages came to each destination within `history`. Destinations without messages are left out.

    Keys: first_at and last_at (to five minutes), and longest, the longest time without any.
    """
    return {row.pop("name"): row for row in _mappings_of(connection, _ACTIVITY, {"history": history})}


_ACTIVITY: Final = """
SELECT d.name, min(slot) AS first_at, max(slot) AS last_at, coalesce(max(gap), '0') AS longest
FROM (SELECT destination_id, slot, slot - lag(slot) OVER (PARTITION BY destination_id ORDER BY slot) AS gap
      FROM feed_activity WHERE slot > now() - %(history)s) a JOIN destinations d ON d.id = a.destination_id
GROUP BY d.name"""


def recent_unhandled(connection: Connection) -> Mappings:
    """Return recent messages of production destinations that no handler takes: the newest ones, within a day.

    Keys: destination, kind, count, last_at.
    """
    return _mappings_of(connection, _UNHANDLED, {"rows": _LATEST})


_UNHANDLED: Final = """
SELECT d.name AS destination, m.kind, count(*) AS count, max(m.received_at) AS last_at
FROM (SELECT destination_id, kind, state, received_at FROM messages ORDER BY id DESC LIMIT %(rows)s) m
JOIN destinations d ON d.id = m.destination_id
WHERE m.state = 'unhandled' AND d.environment = 'production' AND d.enabled AND m.received_at > now() - interval '1 day'
GROUP BY d.name, m.kind ORDER BY d.name, count(*) DESC"""


def _loaded(handler: ColumnElement[Any]) -> ColumnElement[bool]:
    table = schema.workers
    return exists().where(table.c.seen_at > func.now() - WORKER_SILENT, handler == table.c.handlers.any_())


# --- evidence


def audit(connection: Connection, where: AuditFilter, *, before: int | None = None, limit: int) -> Mappings:
    """Return audit rows, newest first. `detail` is parsed; `noted`: an operator gave a reason (see `note`)."""
    table = schema.audit_events
    query = (
        select(*_shown(table), table.c.note.is_not(None).label("noted"))
        .where(*where.clauses())
        .order_by(table.c.id.desc())
        .limit(limit)
    )
    found = _mappings(connection, query if before is None else query.where(table.c.id < before))
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


# --- feeds


def feed_status(connection: Connection) -> Mappings:
    """Return the state of each destination's feed. Keys:

    destination, environment, enabled;
    last_200_at: when a message was last answered 200;
    last_refusal_at, last_refusal_reason, last_refusal_status (null in a summed-up row), last_refusal_authentic;
    probably_paused: the last refused request came from a holder of a credential, and nothing was answered 200 since
    (queries do not count: Redox does not repeat them, and they pause nothing);
    backlog, oldest_pending_at: pending deliveries;
    waiting: the same for each handler, as [{handler, pending, oldest, loaded (by a running worker), never_tried,
    oldest_never_tried}];
    held_lanes: [lane]; paused_handlers: [{handler, paused_at, pause_reason}];
    unserved: [{handler, pending}] that no live worker has loaded;
    dead: [{handler, error_class, count, last_at}];
    quarantined, quarantined_bytes, quarantine: [{quarantine_reason, count, bytes}].
    """
    backlog, dead, held = _backlog(connection), _dead(connection), _held(connection)
    paused, quarantine = _paused(connection), _quarantine(connection)
    return [
        {
            "destination": each["name"],
            "environment": each["environment"],
            "enabled": each["enabled"],
            **_answers(connection, each["name"]),
            "backlog": sum(row["pending"] for row in backlog[each["id"]]),
            "oldest_pending_at": min((row["oldest"] for row in backlog[each["id"]]), default=None),
            "waiting": backlog[each["id"]],
            "held_lanes": [row["lane"] for row in held[each["id"]]],
            "paused_handlers": paused[each["id"]],
            "unserved": [
                {"handler": row["handler"], "pending": row["pending"]}
                for row in backlog[each["id"]]
                if not row["loaded"]
            ],
            "dead": dead[each["id"]],
            "quarantined": sum(row["count"] for row in quarantine[each["id"]]),
            "quarantined_bytes": sum(row["bytes"] for row in quarantine[each["id"]]),
            "quarantine": quarantine[each["id"]],
        }
        for each in destinations(connection)
    ]


def _answers(connection: Connection, destination: str) -> dict[str, Any]:
    """Return the last 200, the last refusal, and whether Redox has probably paused."""
    table = schema.audit_events
    detail = cast(table.c.detail, JSONB)
    status, query = detail["status"].as_integer(), func.coalesce(detail["query"].as_boolean(), false())
    authentic = or_(table.c.actor == "redox", table.c.reason.in_(AUTHENTIC_REASONS))

    def latest(*conditions: ColumnElement[bool]) -> Any:
        these = and_(table.c.destination == destination, *conditions)
        newest = select(table.c.id).where(these).order_by(table.c.id.desc()).limit(1).scalar_subquery()
        return connection.execute(
            select(table.c.at, table.c.reason, status.label("status"), authentic.label("authentic"))
            .where(these, table.c.id > newest - _LATEST)
            .order_by(table.c.at.desc())
            .limit(1)
        ).one_or_none()

    refused = table.c.action == "message.refuse"
    good, bad, ours = latest(table.c.action == "message.receive"), latest(refused), latest(refused, authentic, ~query)
    return {
        "last_200_at": good and good.at,
        "last_refusal_at": bad and bad.at,
        "last_refusal_reason": bad and bad.reason,
        "last_refusal_status": bad and bad.status,
        "last_refusal_authentic": bool(bad and bad.authentic),
        "probably_paused": ours is not None and (good is None or ours.at > good.at),
    }


def recent_refusals(connection: Connection, destination: str | None) -> Mappings:
    """Return recently refused requests for a destination; None: those that name an unknown destination.

    For each subject (`message`, `token`) and reason: status; `since` (how many after the last accepted one, within a
    day) with since_first_at and since_last_at; `window` (how many within RECENT), and accepted_window (how many were
    accepted then); `mixed`: a refusal came after one of the last two accepted; last_accepted_at. Reads only the newest
    rows of the audit log, and so counts no further back.
    """
    return _mappings_of(connection, _RECENT_REFUSALS, {"destination": destination, "rows": _LATEST, "recent": RECENT})


_RECENT_REFUSALS: Final = """
WITH newest AS (
    SELECT action, reason, at, count, detail::jsonb ->> 'status' AS status FROM audit_events
    WHERE destination IS NOT DISTINCT FROM %(destination)s ORDER BY id DESC LIMIT %(rows)s),
requests AS (
    SELECT split_part(action, '.', 1) AS subject, action IN ('message.refuse', 'token.refuse') AS refused, reason, at,
           count, status
    FROM newest WHERE action IN ('message.receive', 'message.refuse', 'token.issue', 'token.refuse')
      AND at > now() - interval '1 day'),
accepted AS (
    SELECT subject, max(at) AS last_accepted_at, (array_agg(at ORDER BY at DESC))[2] AS before_last,
           sum(count) FILTER (WHERE at > now() - %(recent)s) AS accepted_window
    FROM requests WHERE NOT refused GROUP BY subject)
SELECT r.subject, r.reason, max(r.status)::integer AS status, a.last_accepted_at,
       coalesce(sum(r.count) FILTER (WHERE r.at > s.after), 0)::bigint AS since,
       min(r.at) FILTER (WHERE r.at > s.after) AS since_first_at,
       max(r.at) FILTER (WHERE r.at > s.after) AS since_last_at,
       coalesce(sum(r.count) FILTER (WHERE r.at > now() - %(recent)s), 0)::bigint AS "window",
       min(r.at) FILTER (WHERE r.at > now() - %(recent)s) AS window_first_at,
       max(r.at) FILTER (WHERE r.at > now() - %(recent)s) AS window_last_at,
       coalesce(a.accepted_window, 0)::bigint AS accepted_window,
       coalesce(bool_or(r.at > a.before_last), true) AS mixed
FROM requests r LEFT JOIN accepted a USING (subject)
CROSS JOIN LATERAL (SELECT coalesce(a.last_accepted_at, '-infinity') AS after) s
WHERE r.refused GROUP BY r.subject, r.reason, a.last_accepted_at, a.accepted_window
ORDER BY max(r.at) DESC"""


def _mappings_of(connection: Connection, statement: str, values: Mapping[str, Any]) -> Mappings:
    return [dict(row) for row in connection.exec_driver_sql(statement, dict(values)).mappings()]


def _grouped(connection: Connection, query: Select[Any]) -> defaultdict[int, Mappings]:
    """Return the rows by their destination's id."""
    found: defaultdict[int, Mappings] = defaultdict(list)
    for row in _mappings(connection, query):
        found[row.pop("destination_id")].append(row)
    return found


def _untried(table: Table) -> ColumnElement[bool]:
    return and_(table.c.attempts == 0, table.c.started_at.is_(None))


def _backlog(connection: Connection) -> defaultdict[int, Mappings]:
    table = schema.deliveries
    return _grouped(
        connection,
        select(
            table.c.destination_id,
            table.c.handler,
            func.count().label("pending"),
            func.min(table.c.created_at).label("oldest"),
            _loaded(table.c.handler).label("loaded"),
            func.count().filter(_untried(table)).label("never_tried"),
            func.min(table.c.created_at).filter(_untried(table)).label("oldest_never_tried"),
        )
        .where(table.c.state == "pending")
        .group_by(table.c.destination_id, table.c.handler)
        .order_by(table.c.handler),
    )


def _dead(connection: Connection) -> defaultdict[int, Mappings]:
    table = schema.deliveries
    return _grouped(
        connection,
        select(
            table.c.destination_id,
            table.c.handler,
            table.c.error_class,
            func.count().label("count"),
            func.max(table.c.finished_at).label("last_at"),
        )
        .where(table.c.state == "dead")
        .group_by(table.c.destination_id, table.c.handler, table.c.error_class)
        .order_by(func.count().desc()),
    )


def _held(connection: Connection) -> defaultdict[int, Mappings]:
    table = schema.lanes
    return _grouped(
        connection, select(table.c.destination_id, table.c.lane).where(table.c.state == "held").order_by(table.c.lane)
    )


def _paused(connection: Connection) -> defaultdict[int, Mappings]:
    table = schema.subscriptions
    return _grouped(
        connection,
        select(table.c.destination_id, table.c.handler, table.c.paused_at, table.c.pause_reason)
        .where(table.c.paused_at.is_not(None), table.c.enabled)
        .order_by(table.c.handler),
    )


def _quarantine(connection: Connection) -> defaultdict[int, Mappings]:
    table = schema.messages
    return _grouped(
        connection,
        select(
            table.c.destination_id,
            table.c.quarantine_reason,
            func.count().label("count"),
            func.sum(table.c.size).label("bytes"),
        )
        .where(table.c.state == "quarantined")
        .group_by(table.c.destination_id, table.c.quarantine_reason)
        .order_by(func.count().desc()),
    )
