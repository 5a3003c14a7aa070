"""Message builder: prepares an admitted message for the database: body sealed, row signed, columns filled.

Must not access the database. Entries are built in the request's thread. From then on they belong to the writer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from msgspec import structs

from receiver.errors import Unavailable
from receiver.keyring import Keyring
from receiver.pipeline import Admitted, Receipt
from receiver.protocol.digests import sha256
from receiver.protocol.message import ParsedMessage
from receiver.states import MessageState
from receiver.storage.accept.fan_out import NewDelivery, deliveries
from receiver.storage.evidence.audit_log import AuditEvent
from receiver.storage.evidence.encryption import Sealer, payload_binding
from receiver.storage.evidence.macs import KeyedDigests, SigningKey, row_mac
from receiver.storage.identifiers import uuid7

# An identical body without any id may be a new message after a day.
KEY_LIFETIME: Final = timedelta(hours=24)
# The quarantine reason of a message whose metadata columns the database refuses.
UNSTORABLE: Final = "unstorable_columns"

# The metadata columns: claims of the sender, all null for a message that could not be read.
_METADATA: Final = (
    "source_id",
    "kind",
    "log_id",
    "attempt_id",
    "message_id",
    "transmission_id",
    "facility",
    "event_time",
)


@dataclass(slots=True, eq=False)
class PendingMessage:
    """One admitted message: its row and its sealed body. `enqueued`: seconds of the monotonic clock.

    `repeats`: entries of the same batch with the same content. They are answered as duplicates of this one.
    """

    admitted: Admitted
    row: dict[str, Any] = field(repr=False)
    sealed: bytes = field(repr=False)
    deliveries: list[NewDelivery]
    enqueued: float = field(default_factory=time.monotonic)
    future: Future[Receipt] = field(default_factory=Future)
    repeats: list[PendingMessage] = field(default_factory=list)

    @property
    def identity(self) -> tuple[int, bytes, bytes] | None:
        """Return the key of duplicates; None for a query, which has none."""
        row = self.row
        return None if row["key"] is None else (row["destination_id"], row["key"], row["outside"])

    def delivery_rows(self) -> Iterator[dict[str, Any]]:
        """Return its deliveries as rows for receiver.storage.accept.sql."""
        for each in self.deliveries:
            yield {
                "d_uuid": self.row["uuid"],
                "d_destination_id": self.row["destination_id"],
                "d_handler": each.handler,
                "d_lane": each.lane,
                "d_inline": each.inline,
            }

    def events(self) -> list[AuditEvent]:
        """Return the audit rows of a new message and of its repeats."""
        uuid = self.row["uuid"]
        return [self._event(self.row["state"], uuid), *(each._event("duplicate", uuid) for each in self.repeats)]

    def repeat_events(self, known: UUID, taken_up: Iterable[str]) -> list[AuditEvent]:
        """Return the audit rows when all of it repeats the message `known`, of which `taken_up` (states) now runs."""
        return [each._event("duplicate", known, taken_up) for each in (self, *self.repeats)]

    def _event(self, outcome: str, message_uuid: UUID, taken_up: Iterable[str] = ()) -> AuditEvent:
        detail = {"credentials": self.admitted.verified.credentials, "attempt": self.row["attempt_id"]}
        if taken := sorted(taken_up):
            detail["taken_up"] = taken
        return AuditEvent(
            action="message.receive",
            outcome=outcome,
            at=self.row["received_at"],
            actor="redox",
            reason=self.row["quarantine_reason"],
            peer=self.row["peer"],
            destination=self.admitted.destination.name,
            message_uuid=message_uuid,
            detail=detail,
        )

    def answer(self, receipt: Receipt) -> None:
        """Set the receipt as the result, and one marked as a repeat for its repeats."""
        resolve_future(self.future, receipt)
        for each in self.repeats:
            resolve_future(each.future, structs.replace(receipt, outcome="duplicate"))

    def fail(self, reason: str) -> None:
        """Fail all of its futures: it cannot be recorded now."""
        for each in (self, *self.repeats):
            resolve_future(each.future, Unavailable(reason))


@dataclass(slots=True, eq=False)
class PendingAudit:
    """An audit row that a caller waits for."""

    event: AuditEvent
    enqueued: float = field(default_factory=time.monotonic)
    future: Future[None] = field(default_factory=Future)

    def fail(self, reason: str) -> None:
        """Fail the future: the row cannot be recorded now."""
        resolve_future(self.future, Unavailable(reason))


def resolve_future(future: Future[Any], result: object) -> None:
    """Set the result, unless the watchdog has set it or the caller has cancelled it."""
    try:
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
    except InvalidStateError:
        pass


def fold(entries: Iterable[PendingMessage]) -> list[PendingMessage]:
    """Return the entries, with each repeat put under its first. Entries of one key with other content are flagged."""
    leaders: dict[tuple[int, bytes, bytes], PendingMessage] = {}
    keys: set[tuple[int, bytes]] = set()
    folded = []
    for entry in entries:
        identity = entry.identity
        if identity is not None:
            if identity in leaders:
                leaders[identity].repeats.append(entry)
                continue
            leaders[identity] = entry
            entry.row["id_conflict"] = identity[:2] in keys
            keys.add(identity[:2])
        folded.append(entry)
    return folded


class MessageBuilder:
    """Builds entries under one keyring. Thread-safe."""

    def __init__(self, keyring: Keyring, seals: Sealer) -> None:
        self._seals = seals
        self._digests = KeyedDigests(keyring)
        self._signing_key = SigningKey(keyring)

    def make(self, admitted: Admitted) -> PendingMessage:
        """Return the entry of an admitted message: body sealed, row signed, deliveries listed."""
        inbound, message = admitted.inbound, admitted.message
        uuid = uuid7()
        payload_key, sealed = self._seals.seal_body(inbound.body, payload_binding(str(uuid)))
        new = []
        if message is not None and admitted.quarantine is None:
            new = deliveries(message, admitted.destination, self._digests)
        digest = sha256(inbound.body)
        key, outside, key_expires_at = self._key(admitted, digest)
        row = {
            **_metadata(message),
            "key": key,
            "outside": outside,
            "key_expires_at": key_expires_at,
            "id": None,
            "uuid": uuid,
            "destination_id": admitted.destination.id,
            "credential_ids": list(admitted.verified.credentials),
            "query": admitted.query is not None,
            "received_at": inbound.head.received_at,
            "peer": _clean(inbound.head.peer),
            "digest": self._digests.content_of(digest),
            "size": len(inbound.body),
            "content_type": _clean(inbound.head.headers.get("content-type")),
            "state": _state(admitted, new),
            "quarantine_reason": admitted.quarantine,
            "id_conflict": False,
            "payload_key": payload_key,
            "mac_key": None,
        }
        self._sign(row)
        return PendingMessage(admitted=admitted, row=row, sealed=sealed, deliveries=new)

    def _sign(self, row: dict[str, Any]) -> None:
        row["mac_key"], key = self._signing_key.current()
        row["mac"] = row_mac(key, "messages", row)

    def _key(self, admitted: Admitted, digest: bytes) -> tuple[bytes | None, bytes | None, datetime | None]:
        """Return the key of duplicates as (key, outside, when it expires).

        A query has none: a duplicate's sender would miss the answer.
        """
        message, expires = admitted.message, admitted.inbound.head.received_at + KEY_LIFETIME
        if admitted.query is not None:
            return None, None, None
        if message is None:  # the same unreadable bytes are a repeat
            return self._digests.message_key(digest), self._digests.outside(digest), expires
        key, outside = self._digests.message_key(message.key), self._digests.outside(message.outside)
        return key, outside, expires if message.key_expires else None

    def without_metadata(self, entry: PendingMessage) -> None:
        """Clear every column about the content. The same bytes remain, in quarantine."""
        entry.row |= _metadata(None) | {
            "content_type": None,
            "state": MessageState.QUARANTINED.value,
            "quarantine_reason": UNSTORABLE,
        }
        self._sign(entry.row)
        entry.deliveries = []


def _metadata(message: ParsedMessage | None) -> dict[str, Any]:
    if message is None:
        return dict.fromkeys(_METADATA) | {"test": False}
    # Written out: a lookup of each column by name takes twice as long.
    return {
        "source_id": message.source_id,
        "kind": message.kind,
        "log_id": message.log_id,
        "attempt_id": message.attempt_id,
        "message_id": message.message_id,
        "transmission_id": message.transmission_id,
        "facility": message.facility,
        "event_time": message.event_time,
        "test": message.test,
    }


def _state(admitted: Admitted, new: list[NewDelivery]) -> str:
    """Return the first state of the message. A query belongs to its responder, so it never waits for a handler."""
    if admitted.quarantine is not None:
        return MessageState.QUARANTINED.value
    return (MessageState.ACCEPTED if new or admitted.query else MessageState.UNHANDLED).value


def _clean(text: str | None) -> str | None:
    return None if text is None else text.replace("\0", "")[:200]
