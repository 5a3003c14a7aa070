"""Waiting deliveries: reads the next deliveries of a lane, with their messages and sealed payloads.

Must not start them (see receiver.storage.queue.outcomes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, CursorResult

from receiver.errors import IntegrityError
from receiver.states import DeliveryState
from receiver.storage.evidence.macs import COLUMNS, RowMacs
from receiver.storage.queue.lane_names import UNORDERED
from receiver.storage.queue.leases import HANDLER_ACTIVE, Lease, by_column

# States in SQL texts are literals: a partial index is not used for a parameter.
_PENDING: Final = DeliveryState.PENDING

# How many deliveries a handler process reads from each lane when it has many lanes.
HEADS: Final = 8
# How many deliveries it reads ahead from a single lane.
BATCH_ROWS: Final = 64
BATCH_BYTES: Final = 4 * 1024 * 1024
# The message fields that its MAC covers.
_SIGNED: Final = (*COLUMNS["messages"], "mac", "mac_key")


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitingDelivery:
    """A delivery to run, with its message. `deferred_for`: seconds since the first RetryLater, else 0.

    `lost`: an attempt began and its end was never recorded. `sealed` is None when the payload was purged.
    """

    id: int
    attempts: int
    generation: int
    lost: bool
    deferred_for: float
    uuid: UUID
    kind: str
    source_id: str | None
    log_id: str | None
    message_id: str | None
    transmission_id: str | None
    facility: str | None
    event_time: datetime | None
    received_at: datetime
    test: bool
    payload_key: str | None
    sealed: bytes | None = field(repr=False)
    # The other fields that the message's MAC covers, and the destinations of the message, the delivery and the lane.
    destination_id: int
    credential_ids: Sequence[int]
    query: bool
    attempt_id: str | None
    peer: str
    digest: bytes
    size: int
    content_type: str | None
    mac: bytes = field(repr=False)
    mac_key: str
    delivery_destination: int
    lane_destination: int

    def prove(self, macs: RowMacs) -> None:
        """Raise IntegrityError unless the message is unchanged and belongs to the destination of the delivery and the
        lane.

        Raises UnknownKey when this host lacks the message's key.
        """
        if not macs.hold("messages", {name: getattr(self, name) for name in _SIGNED}):
            raise IntegrityError(
                f"message {self.uuid} was changed after it was recorded: run `redox-receiver audit verify`"
            )
        if not self.destination_id == self.delivery_destination == self.lane_destination:
            raise IntegrityError(
                f"delivery {self.id} does not belong to its message's destination: run `redox-receiver audit verify`"
            )


def _batch(
    chosen: str,
    *,
    held: str = """
    EXISTS (SELECT FROM lanes WHERE lane = %(lane)s AND epoch = %(epoch)s AND owner = %(owner)s)""",
) -> str:
    """Return the query that reads `chosen` deliveries, oldest first, with as many of their payloads as fit (at least
    one).

    `held`: a condition that is true while the caller holds the lane's lease.
    """
    return f"""
WITH chosen AS ({chosen}),
head AS (
    SELECT d.id, d.attempts, d.generation, d.started_at IS NOT NULL AS lost, m.id AS number,
           coalesce(extract(epoch FROM now() - d.deferred_since), 0)::float8 AS deferred_for,
           m.uuid, m.kind, m.source_id, m.log_id, m.message_id, m.transmission_id, m.facility, m.event_time,
           m.received_at, m.test, m.destination_id, m.credential_ids, m.query, m.attempt_id, m.peer, m.digest, m.size,
           m.content_type, m.mac, m.mac_key, d.destination_id AS delivery_destination, l.id AS lane_destination,
           sum(m.size) OVER (ORDER BY d.place, d.id) - m.size AS before, d.place
    FROM chosen d JOIN messages m ON m.id = d.message_id AND m.received_at = d.received_at
    JOIN destinations l ON l.name = split_part(d.lane, '/', 2)
    WHERE {held} AND {HANDLER_ACTIVE})
SELECT h.place, h.id, h.attempts, h.generation, h.lost, h.deferred_for, h.uuid, h.kind, h.source_id, h.log_id,
       h.message_id, h.transmission_id, h.facility, h.event_time, h.received_at, h.test, p.payload_key, p.sealed,
       h.destination_id, h.credential_ids, h.query, h.attempt_id, h.peer, h.digest, h.size, h.content_type, h.mac,
       h.mac_key, h.delivery_destination, h.lane_destination
FROM head h LEFT JOIN payloads p ON p.message_id = h.number AND p.received_at = h.received_at
WHERE h.before < {BATCH_BYTES} ORDER BY h.place, h.id"""


# `id >`: the index scan starts after the deliveries that are done.
_BATCH: Final = _batch(f"""
    SELECT d.*, 0 AS place FROM deliveries d
    WHERE lane = %(lane)s AND state = '{_PENDING}' AND inline = %(inline)s AND id > %(after)s
      AND (%(up_to)s = 0 OR id <= %(up_to)s)
    ORDER BY id LIMIT {BATCH_ROWS}""")
# Deliveries whose pause is over come before those that never ran. These are two index scans, because a single one would
# step over every delivery that still waits.
_BATCH_UNORDERED: Final = _batch(f"""
    (SELECT d.*, 0 AS place FROM deliveries d
     WHERE lane = %(lane)s AND state = '{_PENDING}' AND lane ~ {UNORDERED} AND inline = %(inline)s AND id <> %(after)s
       AND ready_at <= now() ORDER BY ready_at LIMIT {BATCH_ROWS})
    UNION ALL
    (SELECT d.*, 1 AS place FROM deliveries d
     WHERE lane = %(lane)s AND state = '{_PENDING}' AND lane ~ {UNORDERED} AND inline = %(inline)s AND id <> %(after)s
       AND ready_at IS NULL ORDER BY id LIMIT {BATCH_ROWS})""")
# The first deliveries of each of many lanes.
_HEADS: Final = _batch(
    f"""
    SELECT d.*, o.place FROM unnest(%(lanes)s::text[], %(epochs)s::bigint[]) WITH ORDINALITY AS o(lane, epoch, place)
    JOIN lanes l ON l.lane = o.lane AND l.epoch = o.epoch AND l.owner = %(owner)s
    CROSS JOIN LATERAL (SELECT * FROM deliveries WHERE lane = o.lane AND state = '{_PENDING}' AND NOT inline
                        ORDER BY id LIMIT {HEADS}) d""",
    held="true",
)


def batch(
    connection: Connection,
    lease: Lease,
    *,
    after: int = 0,
    unordered: bool = False,
    inline: bool = False,
    up_to: int = 0,
) -> list[WaitingDelivery]:
    """Return the next deliveries of the lane, oldest first; none when the lease is lost or the handler is paused.

    `after`: leave out this delivery and, in an ordered lane, those before it. `up_to`: leave out those beyond it. In an
    unordered lane, deliveries whose pause is over come first; those still pausing are left out.
    """
    rows = connection.exec_driver_sql(
        _BATCH_UNORDERED if unordered else _BATCH, lease.values | {"after": after, "inline": inline, "up_to": up_to}
    )
    return [WaitingDelivery(**each) for _, each in _placed(rows)]


def heads(connection: Connection, leases: Sequence[Lease]) -> list[list[WaitingDelivery]]:
    """Return the next few deliveries of each of these ordered lanes of one handler and owner, as one list for each
    lane.

    A list is empty when the lease is lost, the handler is paused, or the payloads of earlier lanes are too large.
    """
    found: list[list[WaitingDelivery]] = [[] for _ in leases]
    rows = connection.exec_driver_sql(_HEADS, by_column(leases) | {"lane": leases[0].lane})
    for place, each in _placed(rows):
        found[place - 1].append(WaitingDelivery(**each))
    return found


def _placed(rows: CursorResult[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    for row in rows.mappings():
        values = dict(row)
        yield values.pop("place"), values
