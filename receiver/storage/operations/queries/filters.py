"""Filters: which messages, deliveries and audit rows a list or a correction means."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, func, or_

from receiver.storage import schema
from receiver.storage.operations.queries.registry_queries import destination_named
from receiver.storage.operations.queries.rows import equal


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
        found = equal(self, table, ("kind", "source_id", "state", "quarantine_reason"))
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
        found = equal(self, table, ("handler", "state", "error_class", "lane", "message_id"))
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
        found = equal(self, table, ("outcome", "reason", "destination", "message_uuid", "subject"))
        if self.actor is not None:
            # An operator is USER@HOST, with or without the user ids that follow.
            found.append(or_(table.c.actor == self.actor, table.c.actor.startswith(f"{self.actor} ", autoescape=True)))
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
