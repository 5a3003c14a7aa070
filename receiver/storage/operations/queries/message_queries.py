"""Queries of messages and their payloads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, and_, exists, select

from receiver.errors import IntegrityError, NotFound
from receiver.states import MessageState
from receiver.storage import schema
from receiver.storage.evidence.encryption import Sealer, payload_binding
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.operations.queries.filters import MessageFilter
from receiver.storage.operations.queries.rows import LATEST, Mappings, mappings, mappings_of, shown

_owner: Final = schema.destinations

_message_columns: Final = [*shown(schema.messages), _owner.c.name.label("destination")]


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
    return mappings(connection, query if before is None else query.where(table.c.id < before))


def message(connection: Connection, number: int | UUID) -> dict[str, Any]:
    """Return one message by id or uuid. `payload`: its bytes are still stored. Raises NotFound."""
    table, kept = schema.messages, schema.payloads
    found = mappings(
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


def payload(connection: Connection, seals: Sealer, digests: KeyedDigests, found: Mapping[str, Any]) -> bytes | None:
    """Return the exact bytes of a message (a row with id, uuid, received_at); None when they are purged.

    Raises IntegrityError when they differ from what was received.
    """
    table, message = schema.payloads, schema.messages
    row = connection.execute(
        select(table.c.payload_key, table.c.sealed, message.c.digest)
        .join(message, and_(message.c.id == table.c.message_id, message.c.received_at == table.c.received_at))
        .where(table.c.message_id == found["id"], table.c.received_at == found["received_at"])
    ).one_or_none()
    if row is None:
        return None
    body = seals.open_body(row.payload_key, row.sealed, payload_binding(str(found["uuid"])))
    if digests.content(body) != row.digest:
        raise IntegrityError(
            f"the payload of message {found['id']} is not what was received: run `redox-receiver audit verify`"
        )
    return body


def recent_unhandled(connection: Connection) -> Mappings:
    """Return recent messages of production destinations that no handler takes: the newest ones, within a day.

    Keys: destination, kind, count, last_at.
    """
    return mappings_of(connection, _UNHANDLED, {"rows": LATEST})


_UNHANDLED: Final = f"""
SELECT d.name AS destination, m.kind, count(*) AS count, max(m.received_at) AS last_at
FROM (SELECT destination_id, kind, state, received_at FROM messages ORDER BY id DESC LIMIT %(rows)s) m
JOIN destinations d ON d.id = m.destination_id
WHERE m.state = '{MessageState.UNHANDLED}' AND d.environment = 'production' AND d.enabled
  AND m.received_at > now() - interval '1 day'
GROUP BY d.name, m.kind ORDER BY d.name, count(*) DESC"""
