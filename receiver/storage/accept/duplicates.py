"""Duplicates of recorded messages: claiming keys, finding the known message, and taking up what is left undone of it.

Must not begin or end a transaction: the batch writer does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from receiver.pipeline import Receipt
from receiver.states import MessageState
from receiver.storage.accept import sql
from receiver.storage.accept.message_builder import PendingMessage


@dataclass(frozen=True, slots=True)
class KnownMessage:
    """The message that an entry repeats."""

    id: int
    received_at: datetime
    uuid: UUID
    state: str

    @property
    def row(self) -> dict[str, Any]:
        """Return the parameters that name it. The time tells the partition of its rows."""
        return {"message_id": self.id, "received_at": self.received_at}


def claim(connection: Connection, keyed: Sequence[PendingMessage]) -> dict[Any, KnownMessage]:
    """Claim the keys, and set the ids of the entries that got theirs. Returns the known messages of the others."""
    keys = sql.keys([entry.row for entry in keyed])
    claimed: dict[Any, int] = {(r[0], r[1], r[2]): r[3] for r in connection.exec_driver_sql(sql.CLAIM_KEYS, keys)}
    for entry in keyed:
        entry.row["id"] = claimed.get(entry.identity)
    if len(claimed) == len(keyed):
        return {}
    # A separate statement: in the snapshot of the first, a concurrent duplicate is not visible yet.
    found: dict[Any, KnownMessage] = {
        (r[0], r[1], r[2]): KnownMessage(*r[3:]) for r in connection.exec_driver_sql(sql.EXISTING, keys)
    }
    return {entry.identity: found[entry.identity] for entry in keyed if entry.identity not in claimed}


def resume(connection: Connection, entry: PendingMessage, message: KnownMessage) -> tuple[set[str], list[str]]:
    """Run what is dead, unhandled or quarantined of the message: a repeat means that Redox wants it handled.

    Does nothing when the repeat itself is to be quarantined. Returns (those of the three states that apply, lanes with
    new work).
    """
    if not dispatchable(entry):
        return set(), []
    lanes = list(connection.exec_driver_sql(sql.REVIVE_DEAD, message.row).scalars())
    taken_up = {"dead"} if lanes else set()
    if message.state != entry.row["state"]:
        new = message.row | {"state": entry.row["state"]}
        if connection.exec_driver_sql(sql.TAKE_UP, new).rowcount:
            taken_up.add(message.state)
            lanes += connection.exec_driver_sql(
                sql.ADD_DELIVERIES, new | sql.deliveries(list(entry.delivery_rows()))
            ).scalars()
    return taken_up, lanes


def dispatchable(entry: PendingMessage) -> bool:
    """Return whether handlers may run for the entry."""
    return bool(entry.row["state"] != MessageState.QUARANTINED)


def inline_pending(connection: Connection, message: KnownMessage) -> tuple[int, ...]:
    """Return the deliveries of the message that must succeed before the answer."""
    return tuple(connection.exec_driver_sql(sql.INLINE_PENDING, message.row).scalars())


def repeat_receipt(message: KnownMessage, inline: Mapping[int, tuple[int, ...]]) -> Receipt:
    """Return the receipt of a repeat. `inline`: by message id."""
    return Receipt(
        message_id=message.id, uuid=str(message.uuid), outcome="duplicate", inline=inline.get(message.id, ())
    )
