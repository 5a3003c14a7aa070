"""Disclosure of sealed content to an operator (messages, errors, requests, audit reasons), after its audit row.

Nothing is returned before its audit row is in a signed seal: a copy of the seal in the logs shows that it happened.

Must not print or keep the content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine, select

from receiver.errors import Conflict, NotFound
from receiver.keyring import Keyring
from receiver.storage import schema
from receiver.storage.evidence.audit_log import BREAK_GLASS, AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.evidence.seals import AuditSealer
from receiver.storage.operations import queries
from receiver.storage.queue.outbox import answer_binding, request_binding


def disclose(engine: Engine, keyring: Keyring, number: int | UUID, now: datetime, *, actor: str, reason: str) -> bytes:
    """Return the payload of message `number` (id or uuid), after its audit row (`message.disclose`) is sealed.

    Raises NotFound, IntegrityError, and Conflict when it is purged.
    """
    seals = Sealer(keyring)
    chain = AuditChain(keyring, seals)
    with engine.begin() as connection:
        message = queries.message(connection, number)
        body = queries.payload(connection, seals, KeyedDigests(keyring), message)
        if body is None:
            raise Conflict(f"the payload of message {message['id']} is purged; its row and its audit are what is left")
        write(
            connection,
            chain,
            [
                AuditEvent(
                    action="message.disclose",
                    outcome="disclosed",
                    reason=BREAK_GLASS,
                    at=now,
                    actor=actor,
                    destination=message["destination"],
                    message_uuid=message["uuid"],
                    subject=f"messages:{message['id']}",
                    note=reason,
                )
            ],
        )
    AuditSealer(engine, keyring).seal_row(*chain.head)
    return body


def disclose_error(
    engine: Engine, keyring: Keyring, number: int, now: datetime, *, actor: str, reason: str
) -> str | None:
    """Return the text of the last error of delivery `number`, after its audit row (`delivery.disclose`) is sealed.

    Returns None, without an audit row, when no text is stored. Raises NotFound, IntegrityError.
    """
    seals = Sealer(keyring)
    chain = AuditChain(keyring, seals)
    with engine.begin() as connection:
        delivery = queries.delivery(connection, number)
        text = queries.error_text(connection, seals, number)
        if text is not None:
            write(
                connection,
                chain,
                [
                    AuditEvent(
                        action="delivery.disclose",
                        outcome="disclosed",
                        reason=BREAK_GLASS,
                        at=now,
                        actor=actor,
                        subject=f"deliveries:{number}",
                        destination=delivery["destination"],
                        message_uuid=delivery["message_uuid"],
                        note=reason,
                    )
                ],
            )
    if text is not None:
        AuditSealer(engine, keyring).seal_row(*chain.head)
    return text


def disclose_request(
    engine: Engine, keyring: Keyring, number: int, now: datetime, *, actor: str, reason: str
) -> tuple[bytes, bytes | None]:
    """Return (the stored request `number`, the answer of Redox), after its audit row (`outbound.disclose`) is sealed.

    Raises NotFound, IntegrityError, and Conflict when they are purged.
    """
    seals = Sealer(keyring)
    chain = AuditChain(keyring, seals)
    table, owner = schema.outbound_requests, schema.destinations
    with engine.begin() as connection:
        row = connection.execute(
            select(table, owner.c.name)
            .outerjoin(owner, owner.c.id == table.c.destination_id)
            .where(table.c.id == number)
        ).one_or_none()
        if row is None:
            raise NotFound(f"there is no request {number}: see `redox-receiver outbox list`")
        if row.request is None:
            raise Conflict(f"the bodies of request {number} are purged; its row and its audit are what is left")
        request = seals.open_body(row.request_key, row.request, request_binding(row.uuid, row.api_key))
        answer = None if row.answer is None else seals.open_body(row.answer_key, row.answer, answer_binding(row.uuid))
        write(
            connection,
            chain,
            [
                AuditEvent(
                    action="outbound.disclose",
                    outcome="disclosed",
                    reason=BREAK_GLASS,
                    at=now,
                    actor=actor,
                    destination=row.name,
                    message_uuid=row.message_uuid,
                    subject=f"outbound_requests:{number}",
                    note=reason,
                )
            ],
        )
    AuditSealer(engine, keyring).seal_row(*chain.head)
    return request, answer


def disclose_notes(
    connection: Connection,
    keyring: Keyring,
    rows: Sequence[Mapping[str, Any]],
    now: datetime,
    *,
    actor: str,
    reason: str,
) -> list[dict[str, Any]]:
    """Return audit rows (from `queries.audit`), each with its opened reason as `note`; None where none was given.

    Commits the connection's transaction, with an audit row (`audit.disclose`) that gives the number of opened reasons
    and their range of ids, and returns when that row is sealed. If no row has a reason, nothing is opened and nothing
    is written. Raises IntegrityError.
    """
    seals = Sealer(keyring)
    chain = AuditChain(keyring, seals)
    noted = [each["id"] for each in rows if each["noted"]]
    opened = {number: queries.note(connection, seals, number) for number in noted}
    if opened:
        write(
            connection,
            chain,
            [
                AuditEvent(
                    action="audit.disclose",
                    outcome="disclosed",
                    reason=BREAK_GLASS,
                    at=now,
                    actor=actor,
                    note=reason,
                    detail={"notes": len(opened), "first": min(opened), "last": max(opened)},
                )
            ],
        )
        connection.commit()
        AuditSealer(connection.engine, keyring).seal_row(*chain.head)
    return [dict(each) | {"note": opened.get(each["id"])} for each in rows]
