"""The audit: what happened, as rows that a process numbers and chains, and the summing up of floods.

May not decide what is worth a row. Nothing of a patient's, no token and no header value may be given to it but as
`note`, which is sealed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import IPv6Address, ip_address
from typing import Any, Final
from uuid import UUID

import msgspec
from sqlalchemy import Connection, insert

from receiver.keyring import Keyring
from receiver.storage.evidence import chain, mac_key
from receiver.storage.identifiers import uuid7
from receiver.storage.schema import audit_events
from receiver.storage.sealing import Seals

# What a flood of refusals may write: this many rows a minute for one destination, reason and network, and for all
# together; the rest is counted into one row a minute each.
ROWS_EACH: Final = 10
ROWS_IN_ALL: Final = 300
_WINDOW: Final = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditEvent:
    """One thing that happened. `action` is subject.verb; `reason` a fixed word; `detail` fixed keys with ids in them.

    `actor`: "redox", "worker:NAME", "handler:NAME", or "USER@HOST" of a command. `subject`: another row, as "table:id".
    `note`: a person's words, sealed.
    """

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
    note: str | None = field(default=None, repr=False)


class AuditChain:
    """Numbers and chains the rows of one writer: this process, from now on. Not safe in threads."""

    def __init__(self, keyring: Keyring, seals: Seals) -> None:
        key = keyring.current("mac")
        self._key_id, self._key = key.id, mac_key(key)
        self._seals = seals
        self.restart()

    def restart(self) -> None:
        """Begin another chain: after an answer that never came, nobody here knows how far this one was written."""
        self._writer, self._n, self._previous = uuid7(), 0, b""

    def rows(self, events: Sequence[AuditEvent]) -> list[dict[str, Any]]:
        """The next rows, ready to insert. `written` must be called once they are committed."""
        rows = [self._row(number, event) for number, event in enumerate(events, self._n + 1)]
        chain(self._key, rows, self._previous)
        return rows

    def written(self, rows: Sequence[dict[str, Any]]) -> None:
        """The rows are committed: the chain goes on behind them."""
        if rows:
            self._n, self._previous = rows[-1]["n"], rows[-1]["mac"]

    def _row(self, number: int, event: AuditEvent) -> dict[str, Any]:
        note_key, note, detail = None, None, None
        if event.note is not None:
            note_key, note = self._seals.seal("secret", event.note.encode(), note_binding(self._writer, number))
        if event.detail is not None:
            detail = msgspec.json.encode(event.detail, order="sorted").decode()
        return {"writer": self._writer, "n": number, "at": event.at, "action": event.action, "outcome": event.outcome,
                "reason": event.reason, "actor": event.actor, "peer": event.peer, "destination": event.destination,
                "message_uuid": event.message_uuid, "subject": event.subject, "count": event.count,
                "detail": detail, "note": note,
                "note_key": note_key, "mac_key": self._key_id}


def note_binding(writer: UUID, n: int) -> str:
    """What the sealed note of an audit row is bound to."""
    return f"audit:{writer}:{n}"


def write(connection: Connection, audit: AuditChain, events: Sequence[AuditEvent]) -> None:
    """Insert the events in the caller's transaction, for processes that write now and then (commands, workers).

    The caller's transaction must be committed next, or `restart` be called: the chain goes on as if it were.
    """
    rows = audit.rows(events)
    if rows:
        connection.execute(insert(audit_events), rows)
        audit.written(rows)


def network(peer: str) -> str:
    """Whom a flood is counted under: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        address = ip_address(peer)
    except ValueError:
        return "unknown"
    if isinstance(address, IPv6Address):
        # A socket for both families names IPv4 peers like this (RFC 4291 2.5.5.2).
        return str(address.ipv4_mapped or f"{IPv6Address(int(address) >> 64 << 64)}/64")
    return str(address)


# What is counted together: action, destination, reason, network.
_Key = tuple[str, str | None, str | None, str]


class Flood:
    """Lets the first refusals of a minute through as they are and sums up the rest. Not safe in threads.

    Times are seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._passed: Counter[_Key] = Counter()
        self._held: dict[_Key, tuple[AuditEvent, int]] = {}

    def take(self, event: AuditEvent, now: float, *, room: bool) -> list[AuditEvent]:
        """The rows to write for this event and for a minute that has ended; without `room` it is only counted."""
        due = self.due(now) if room else []
        key = (event.action, event.destination, event.reason, network(event.peer or ""))
        if room and self._passed[key] < ROWS_EACH and self._passed.total() < ROWS_IN_ALL:
            self._passed[key] += 1
            return [*due, event]
        if key not in self._held and len(self._held) >= ROWS_IN_ALL:
            # Ever new addresses: what is left to tell is how many.
            key = (event.action, None, "flood", "many")
        self._held[key] = (event, self._held[key][1] + event.count if key in self._held else event.count)
        return due

    def due(self, now: float) -> list[AuditEvent]:
        """What a minute that has ended summed up; begins the next."""
        return self.end(now) if now - self._began >= _WINDOW else []

    def end(self, now: float) -> list[AuditEvent]:
        """All that is summed up so far: at the end of a minute, and before the process ends."""
        events = [_summed(event, key, count) for key, (event, count) in self._held.items()]
        self._began, self._passed, self._held = now, Counter(), {}
        return events


def _summed(event: AuditEvent, key: _Key, count: int) -> AuditEvent:
    """One row for `count` refusals, with the last one's time."""
    action, destination, reason, peer = key
    return AuditEvent(action=action, outcome=event.outcome, at=event.at, actor=event.actor, reason=reason, peer=peer,
                      destination=destination, count=count)
