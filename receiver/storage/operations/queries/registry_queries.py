"""Queries of the registry: destinations, credentials, sources, handlers, keys; and sources that were refused."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Table,
    Text,
    and_,
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

from receiver.errors import NotFound
from receiver.protocol.sources import ID_SHAPE
from receiver.states import MessageState
from receiver.storage import schema
from receiver.storage.operations.queries.rows import Mappings, loaded, mappings, shown

_owner: Final = schema.destinations


def destination_named(connection: Connection, name: str) -> dict[str, Any]:
    """Return one destination. Raises NotFound."""
    found = mappings(connection, select(*shown(_owner)).where(_owner.c.name == name))
    if not found:
        raise NotFound(f"there is no destination {name!r}: see `redox-receiver destination list`")
    return found[0]


def destinations(connection: Connection) -> Mappings:
    """Return all destinations, by name."""
    return mappings(connection, select(*shown(_owner)).order_by(_owner.c.name))


def credentials(connection: Connection, *, destination: str | None = None) -> Mappings:
    """Return credentials, without digests or secrets. `live`: it is valid now."""
    table = schema.credentials
    live = and_(
        or_(table.c.revoked_at.is_(None), table.c.revoked_at > func.now()),
        or_(table.c.expires_at.is_(None), table.c.expires_at > func.now()),
    )
    return mappings(connection, _owned(connection, table, destination, live.label("live")))


def sources(connection: Connection, *, destination: str | None = None) -> Mappings:
    """Return registered sources. `source_id` null: messages that name none."""
    return mappings(connection, _owned(connection, schema.sources, destination))


def subscriptions(connection: Connection, *, destination: str | None = None) -> Mappings:
    """Return handlers bound to destinations. `loaded`: a live worker has it."""
    table = schema.subscriptions
    return mappings(connection, _owned(connection, table, destination, loaded(table.c.handler).label("loaded")))


def keys(connection: Connection) -> Mappings:
    """Return the keys that the database was written with: id, purpose, fingerprint, created_at."""
    return mappings(connection, select(schema.keys).order_by(schema.keys.c.created_at, schema.keys.c.id))


def _owned(connection: Connection, table: Table, owner: str | None, *more: ColumnElement[Any]) -> Select[Any]:
    """Return the rows of a registry table with their destination's name; only those of `owner`, if given."""
    query = (
        select(_owner.c.name.label("destination"), *shown(table), *more)
        .join(_owner, _owner.c.id == table.c.destination_id)
        .order_by(_owner.c.name, table.c.id)
    )
    return query if owner is None else query.where(_owner.c.id == destination_named(connection, owner)["id"])


_SOURCE_REASONS: Final = ("source_unknown", "source_missing", "source_disabled")


def refused_sources(
    connection: Connection, *, destination: str | None = None, since: datetime | None = None, limit: int
) -> Mappings:
    """Return sources of refused or quarantined messages that are still not registered.

    Keys: destination, source_id (null: none named, or not shaped like an id), source_digest (of a value not shaped like
    an id), reason, count, first_at, last_at, several (a flood of sources, not listed one by one), and `add`: the
    arguments of `source add` that register it, or null. Sources seen more than once come first, because a made-up one
    comes once.
    """
    audit, table = schema.audit_events, schema.messages
    detail = cast(audit.c.detail, JSONB)
    refused = select(
        audit.c.destination,
        detail["source"].astext.label("source_id"),
        detail["source_digest"].astext.label("source_digest"),
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
        .where(table.c.state == MessageState.QUARANTINED, table.c.quarantine_reason.in_(_SOURCE_REASONS))
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
    what = (seen.c.destination, seen.c.source_id, seen.c.source_digest, seen.c.reason, seen.c.several)
    counted, last = func.sum(seen.c.count), func.max(seen.c.at)
    found = mappings(
        connection,
        select(*what, counted.label("count"), func.min(seen.c.at).label("first_at"), last.label("last_at"))
        .where(or_(seen.c.several, seen.c.source_digest.is_not(None), ~known))
        .group_by(*what)
        .order_by(and_(counted > 1, ~seen.c.several).desc(), last.desc())
        .limit(limit),
    )
    return [each | {"add": _adding(each)} for each in found]


def _adding(seen: Mapping[str, Any]) -> str | None:
    """Return the arguments, safe to paste: only values shaped like an id, and no id that reads as an option."""
    source_id = seen["source_id"]
    if source_id is None:
        return None if seen["several"] or seen["source_digest"] is not None else f"{seen['destination']} --none"
    if not ID_SHAPE.fullmatch(source_id):
        return None
    return f"{seen['destination']} {'-- ' if source_id.startswith('-') else ''}{source_id}"
