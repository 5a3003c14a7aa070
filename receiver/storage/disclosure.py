"""Hands out the exact bytes of a stored message to a person, and writes down first who asked and why.

May not print or keep them.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import Engine

from receiver.errors import Conflict
from receiver.keyring import Keyring
from receiver.storage import reading
from receiver.storage.audit import AuditChain, AuditEvent, write
from receiver.storage.sealing import Seals


def disclose(engine: Engine, keyring: Keyring, number: int | UUID, now: datetime, *, actor: str, reason: str) -> bytes:
    """The payload of message `number` (id or uuid), after its audit row (`message.disclose`) is committed.

    Raises NotFound, IntegrityError, and Conflict when it is purged.
    """
    seals = Seals(keyring)
    with engine.begin() as connection:
        message = reading.message(connection, number)
        body = reading.payload(connection, seals, message)
        if body is None:
            raise Conflict(f"the payload of message {message['id']} is purged; its row and its audit are what is left")
        write(connection, AuditChain(keyring, seals), [AuditEvent(
            action="message.disclose", outcome="disclosed", at=now, actor=actor, destination=message["destination"],
            message_uuid=message["uuid"], subject=f"messages:{message['id']}", note=reason)])
    return body
