"""Audit log: events as rows that each process numbers and chains.

Must not decide which events deserve a row. Patient data, tokens and header values must not be passed in, except as
`note`, which is sealed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import msgspec
from sqlalchemy import Connection, insert

from receiver.keyring import Keyring
from receiver.protocol.values import Value
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import SigningKey, chain
from receiver.storage.identifiers import uuid7
from receiver.storage.schema import audit_events

_NEWEST: Final = "SELECT id, mac FROM audit_events ORDER BY id DESC LIMIT 1"

# Refusals of a peer that holds, or held, a credential: Redox, not a stranger. A body is refused as too large only after
# headers that could authenticate.
AUTHENTIC_REASONS: Final = (
    "token_expired",
    "token_revoked",
    "bearer_differs",
    "credential_insufficient",
    "body_too_large",
)


# The reason of a disclosure that no role of this program allowed: a command reads whatever the keyring can open, and
# the audit is what holds its user to account.
BREAK_GLASS: Final = "break_glass"


class AuditEvent(Value, frozen=True, kw_only=True):
    """One event. `action` is subject.verb; `reason` a fixed word; `detail` fixed keys with ids in them.

    `actor`: "redox", "worker:NAME", "handler:NAME", or of a command
    "USER@HOST uid=N", with more words where another user logged in or called sudo. `subject`: another row, as
    "table:id". `note`: an operator's words, sealed.
    """

    hidden = frozenset({"note"})

    action: str
    outcome: str
    at: datetime
    actor: str
    reason: str | None = None
    peer: str | None = None
    destination: str | None = None
    message_uuid: UUID | None = None
    subject: str | None = None
    count: int = 1
    detail: dict[str, Any] | None = None
    note: str | None = None


class AuditChain:
    """Numbers and chains the rows of one writer (this process). Not thread-safe."""

    def __init__(self, keyring: Keyring, seals: Sealer) -> None:
        self._signing_key = SigningKey(keyring)
        self._key_id, self._key = self._signing_key.current()
        self._seals = seals
        self.restart()

    @property
    def head(self) -> tuple[UUID, int]:
        """Return the writer and number of the last row that was written."""
        return self._writer, self._n

    def restart(self) -> None:
        """Begin another chain: after a lost answer, the end of this one is unknown."""
        self._writer, self._n, self._previous = uuid7(), 0, b""
        self._follows: int | None = None

    def follow(self, connection: Connection) -> None:
        """Link the first row of a chain to the newest row in the table, so that neither can vanish unseen.

        One query for each chain, none for its later rows. Raises SQLAlchemyError.
        """
        if self._n == 0:
            newest = connection.exec_driver_sql(_NEWEST).one_or_none()
            self._follows, self._previous = (None, b"") if newest is None else (newest.id, newest.mac)

    def rows(self, events: Sequence[AuditEvent]) -> list[dict[str, Any]]:
        """Return the next rows, ready to insert. Call `follow` before, and `written` once they are committed."""
        self._key_id, self._key = self._signing_key.current()
        rows = [self._row(number, event) for number, event in enumerate(events, self._n + 1)]
        chain(self._key, rows, self._previous)
        return rows

    def written(self, rows: Sequence[dict[str, Any]]) -> None:
        """Record that the rows are committed: the chain continues after them."""
        if rows:
            self._n, self._previous = rows[-1]["n"], rows[-1]["mac"]

    def _row(self, number: int, event: AuditEvent) -> dict[str, Any]:
        note_key, note, detail = None, None, None
        if event.note is not None:
            note_key, note = self._seals.seal("payload", event.note.encode(), note_binding(self._writer, number))
        if event.detail is not None:
            detail = msgspec.json.encode(event.detail, order="sorted").decode()
        return {
            "writer": self._writer,
            "n": number,
            "at": event.at,
            "action": event.action,
            "outcome": event.outcome,
            "reason": event.reason,
            "actor": event.actor,
            "peer": event.peer,
            "destination": event.destination,
            "message_uuid": event.message_uuid,
            "subject": event.subject,
            "count": event.count,
            "detail": detail,
            "note": note,
            "note_key": note_key,
            "mac_key": self._key_id,
            "follows": self._follows if number == 1 else None,
        }


def note_binding(writer: UUID, n: int) -> str:
    """Return the binding to which the note of an audit row is sealed."""
    return f"audit:{writer}:{n}"


def write(connection: Connection, audit: AuditChain, events: Sequence[AuditEvent]) -> None:
    """Insert the events in the caller's transaction, for processes that write rarely (commands, workers).

    The caller must commit next, or call `restart`: the chain continues as if the rows were committed.
    """
    if not events:
        return
    audit.follow(connection)
    rows = audit.rows(events)
    connection.execute(insert(audit_events), rows)
    audit.written(rows)


def write_once(connection: Connection, keyring: Keyring, events: Sequence[AuditEvent]) -> None:
    """Insert the events as a chain of their own, in the caller's transaction, for a command that writes once."""
    write(connection, AuditChain(keyring, Sealer(keyring)), events)
