"""Disclosure of sealed content to an operator (a message, an error, audit reasons), after recording the request.

Must not print or keep the content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine

from receiver.errors import Conflict
from receiver.keyring import Keyring
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.operations import queries


def disclose(engine: Engine, keyring: Keyring, number: int | UUID, now: datetime, *, actor: str, reason: str) -> bytes:
    """Return the payload of message `number` (id or uuid), after committing its audit row (`message.disclose`).

    Raises NotFound, IntegrityError, and Conflict when it is purged.
    """
    seals = Sealer(keyring)
    with engine.begin() as connection:
        message = queries.message(connection, number)
        body = queries.payload(connection, seals, message)
        if body is None:
            raise Conflict(f"the payload of message {message['id']} is purged; its row and its audit are what is left")
        write(
            connection,
            AuditChain(keyring, seals),
            [
                AuditEvent(
                    action="message.disclose",
                    outcome="disclosed",
                    at=now,
                    actor=actor,
                    destination=message["destination"],
                    message_uuid=message["uuid"],
                    subject=f"messages:{message['id']}",
                    note=reason,
                )
            ],
        )
    return body


def disclose_error(
    engine: Engine, keyring: Keyring, number: int, now: datetime, *, actor: str, reason: str
) -> str | None:
    """Return the text of the last error of delivery `number`, after committing its audit row (`delivery.disclose`).

    Returns None, without an audit row, when no text is stored. Raises NotFound, IntegrityError.
    """
    seals = Sealer(keyring)
    with engine.begin() as connection:
        delivery = queries.delivery(connection, number)
        text = queries.error_text(connection, seals, number)
        if text is not None:
            write(
                connection,
                AuditChain(keyring, seals),
                [
                    AuditEvent(
                        action="delivery.disclose",
                        outcome="disclosed",
                        at=now,
                        actor=actor,
                        subject=f"deliveries:{number}",
                        destination=delivery["destination"],
                        message_uuid=delivery["message_uuid"],
                        note=reason,
                    )
                ],
            )
    return text


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
    and their range of ids. If no row has a reason, nothing is opened and nothing is written. Raises IntegrityError.
    """
    seals = Sealer(keyring)
    noted = [each["id"] for each in rows if each["noted"]]
    opened = {number: queries.note(connection, seals, number) for number in noted}
    if opened:
        write(
            connection,
            AuditChain(keyring, seals),
            [
                AuditEvent(
                    action="audit.disclose",
                    outcome="disclosed",
                    at=now,
                    actor=actor,
                    note=reason,
                    detail={"notes": len(opened), "first": min(opened), "last": max(opened)},
                )
            ],
        )
        connection.commit()
    return [dict(each) | {"note": opened.get(each["id"])} for each in rows]
