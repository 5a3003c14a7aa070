"""Decisions about messages: whether a message can be replayed or released, and which deliveries it then gets.

Must not create deliveries. To release a message that was unreadable on arrival, its key and metadata are stored here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import DataError

from receiver.errors import Conflict, IntegrityError, UnknownSource, Unreadable
from receiver.keyring import Keyring
from receiver.protocol import sources
from receiver.protocol.message import ParsedMessage
from receiver.protocol.reading import read
from receiver.protocol.registry import Destination
from receiver.states import DeliveryState, MessageState
from receiver.storage import schema
from receiver.storage.accept.fan_out import NewDelivery, deliveries
from receiver.storage.accept.message_builder import UNSTORABLE
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import KeyedDigests, mac_key, row_mac
from receiver.storage.operations import queries

REPLAYABLE: Final = (MessageState.ACCEPTED, MessageState.UNHANDLED)
_WRONG_STATE: Final = {
    MessageState.QUARANTINED: "is in quarantine: see `redox-receiver messages release`",
    MessageState.DISCARDED: "was discarded",
    MessageState.ACCEPTED: "is not in quarantine",
    MessageState.UNHANDLED: "is not in quarantine",
}
_CHANGED_DESTINATION: Final = "its destination's row was changed by something else: run `redox-receiver audit verify`"


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageDecision:
    """The decision about a message: `new` deliveries of its `kind`; or nothing, and `why`.

    `reason`: why it stays in quarantine.
    """

    row: Mapping[str, Any]
    destination: str
    kind: str | None = None
    new: tuple[NewDelivery, ...] = ()
    why: str | None = None
    reason: str | None = None


def unproved(row: Mapping[str, Any]) -> MessageDecision:
    """Leave a message whose destination's row has a MAC that does not hold."""
    return MessageDecision(row=row, destination="", why=_CHANGED_DESTINATION)


class MessageDecisions:
    """Decides about messages. Opens their bodies and computes the digests of their patients."""

    def __init__(self, keyring: Keyring, sealer: Sealer) -> None:
        self._keyring = keyring
        self._sealer = sealer
        self._digests = KeyedDigests(keyring)
        self._key = keyring.current("mac")

    def discard(self, _connection: Connection, row: Mapping[str, Any], destination: Destination) -> MessageDecision:
        """Decide whether the message can be discarded."""
        why = None if row["state"] == MessageState.QUARANTINED else _WRONG_STATE[row["state"]]
        return MessageDecision(row=row, destination=destination.name, why=why)

    def replay(
        self, connection: Connection, row: Mapping[str, Any], destination: Destination, *, handler: str | None
    ) -> MessageDecision:
        """Decide whether the message can be replayed, to all handlers that take it or only to `handler`."""
        left = partial(MessageDecision, row=row, destination=destination.name)
        if row["state"] not in REPLAYABLE:
            return left(why=_WRONG_STATE[row["state"]])
        if row["query"]:
            return left(why="is a query: its sender no longer waits")
        try:
            message = self._read(connection, row)
        except (Conflict, IntegrityError) as exc:
            return left(why=str(exc))
        except Unreadable as exc:
            return left(why=f"cannot be read any more: {exc.reason}")
        new = [each for each in deliveries(message, destination, self._digests) if handler in (None, each.handler)]
        if not new:
            return left(
                why=f"no enabled handler takes {message.kind}"
                if handler is None
                else f"{handler} is not enabled, or does not take {message.kind}"
            )
        table = schema.deliveries
        pending = set(
            connection.scalars(
                select(table.c.handler).where(table.c.message_id == row["id"], table.c.state == DeliveryState.PENDING)
            )
        )
        new = [each for each in new if each.handler not in pending]
        if not new:
            return left(why="is pending already")
        return left(kind=message.kind, new=tuple(new))

    def release(self, connection: Connection, row: Mapping[str, Any], destination: Destination) -> MessageDecision:
        """Decide whether the message may leave quarantine. If it may, its key and its metadata are stored."""
        left = partial(MessageDecision, row=row, destination=destination.name)
        if row["state"] != MessageState.QUARANTINED:
            return left(why=_WRONG_STATE[row["state"]])
        if row["query"]:
            return left(why="is a query: its sender no longer waits; discard it")
        try:
            message = self._read(connection, row)
            reason = sources.admit(message, destination)
            if reason is None and not self._claim_key(connection, row, message):
                return left(why="was received again as another message: discard this one")
            if reason is None and row["kind"] is None and not self._fill(connection, row["id"], message):
                reason = UNSTORABLE
        except (Conflict, IntegrityError) as exc:
            return left(why=str(exc))
        except (Unreadable, UnknownSource) as exc:
            return left(why=f"stays in quarantine: {exc.reason}", reason=exc.reason)
        if reason is not None:
            return left(why=f"stays in quarantine: {reason}", reason=reason)
        return left(kind=message.kind, new=tuple(deliveries(message, destination, self._digests)))

    def _read(self, connection: Connection, row: Mapping[str, Any]) -> ParsedMessage:
        """Return the message in the stored bytes. Raises Unreadable, IntegrityError, or Conflict (purged)."""
        body = queries.payload(connection, self._sealer, self._digests, row)
        if body is None:
            raise Conflict("its payload is purged: nothing is left to deliver")
        return read(body)

    def _claim_key(self, connection: Connection, row: Mapping[str, Any], message: ParsedMessage) -> bool:
        """Claim the key that repeats of the message will have. Returns False when another message has it.

        Until it was read, its key was the digest of its bytes.
        """
        if message.key_expires:
            return True
        table = schema.message_keys
        key = {
            "destination_id": row["destination_id"],
            "key": self._digests.message_key(message.key),
            "outside": self._digests.outside(message.outside),
        }
        connection.execute(
            upsert(table).values(**key, message_id=row["id"], received_at=row["received_at"]).on_conflict_do_nothing()
        )
        return bool(connection.scalar(select(table.c.message_id).filter_by(**key)) == row["id"])

    def _fill(self, connection: Connection, number: int, message: ParsedMessage) -> bool:
        """Fill the metadata columns of a message that was unreadable on arrival, sign its row, and queue its patients.

        Handlers receive these columns. Returns False when the database refuses them. Raises IntegrityError when the
        row's MAC fails.
        """
        table = schema.messages
        row = dict(connection.execute(select(table).where(table.c.id == number)).mappings().one())
        if row_mac(mac_key(self._keyring[row["mac_key"]]), table.name, row) != row["mac"]:
            raise IntegrityError("its row was changed by something else: run `redox-receiver audit verify`")
        filled = {name: getattr(message, name) for name in ParsedMessage.__struct_fields__ if name in table.c}
        try:
            with connection.begin_nested():
                connection.execute(
                    update(table)
                    .where(table.c.id == number)
                    .values(
                        **filled,
                        mac=row_mac(mac_key(self._key), table.name, row | filled),
                        mac_key=self._key.id,
                        patients_indexed_at=None,
                    )
                )
        except DataError:
            return False
        return True
