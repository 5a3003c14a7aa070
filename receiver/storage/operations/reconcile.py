"""Reconciliation: which of the messages that Redox reports as sent are recorded.

Must not change anything.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, select

from receiver.keyring import Keyring
from receiver.protocol.reading import log_key
from receiver.storage import schema
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.operations.queries import destination_named


def recorded(
    connection: Connection, keyring: Keyring, log_ids: Collection[str], *, destination: str | None = None
) -> set[str]:
    """Return those of the `Meta.Logs[].ID`s that belong to a message accepted at `destination`, or at any.

    Raises NotFound for an unknown destination.
    """
    keys, messages = schema.message_keys, schema.messages
    if destination is None:
        owners = list(connection.scalars(select(schema.destinations.c.id)))
    else:
        owners = [destination_named(connection, destination)["id"]]
    digests = KeyedDigests(keyring)
    named = {digests.message_key(log_key(each)): each for each in log_ids}
    found = {
        named[key]
        for key in connection.scalars(
            select(keys.c.key).where(keys.c.destination_id.in_(owners), keys.c.key.in_(named))
        )
    }
    # A query has no key, because it has no duplicates. A message that was unreadable is known by its bytes alone.
    return found | set(
        connection.scalars(
            select(messages.c.log_id).where(
                messages.c.destination_id.in_(owners), messages.c.query, messages.c.log_id.in_(set(log_ids) - found)
            )
        )
    )
