"""Leases: a worker or receiver process claims a lane, renews its lease, and releases it.

A lane without a row is ready. All times come from the database, because the clocks of hosts differ. The results of a
run are written only while its `Lease` is held under the same epoch: a host that was frozen and resumes writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection

from receiver.states import DeliveryState, LaneState

# States in SQL texts are literals: a partial index is not used for a parameter.
_PENDING, _READY, _WAITING = DeliveryState.PENDING, LaneState.READY, LaneState.WAITING

# How long a lease renewal waits for a lane that the commit of an outcome locks.
_LOCK_TIMEOUT: Final = "1s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A lease: the lane, its owner (the name of a worker or receiver process) and its epoch."""

    lane: str
    epoch: int
    owner: str

    @property
    def values(self) -> dict[str, Any]:
        """The parameters of a statement that requires the lease."""
        return {"lane": self.lane, "epoch": self.epoch, "owner": self.owner}


# The handler is bound to the destination and not paused. Checked before every start, so that a pause takes effect at
# once.
HANDLER_ACTIVE: Final = """EXISTS (
    SELECT FROM subscriptions s JOIN destinations t ON t.id = s.destination_id
    WHERE s.handler = split_part(%(lane)s, '/', 1) AND t.name = split_part(%(lane)s, '/', 2)
      AND s.enabled AND s.paused_at IS NULL)"""
# The lease is held, and stays held until this transaction ends.
LEASE_HELD: Final = """held AS (
    SELECT 1 FROM lanes WHERE lane = %(lane)s AND epoch = %(epoch)s AND owner = %(owner)s FOR NO KEY UPDATE)"""


def lane_free(table: str) -> str:
    """Return the condition that the lane can be claimed. `table`: the name of `lanes` in the statement."""
    return (
        f"({table}.owner IS NULL OR {table}.lease_until < now()) AND ({table}.state = '{_READY}' "
        f"OR {table}.state = '{_WAITING}' AND {table}.ready_at <= now())"
    )


_CLAIM: Final = f"""
INSERT INTO lanes AS l (lane, handler, destination_id, owner, epoch, lease_until)
SELECT %(lane)s, s.handler, s.destination_id, %(owner)s, 1, now() + make_interval(secs => %(seconds)s)
FROM subscriptions s JOIN destinations t ON t.id = s.destination_id
WHERE s.handler = split_part(%(lane)s, '/', 1) AND t.name = split_part(%(lane)s, '/', 2)
  AND s.enabled AND s.paused_at IS NULL
  AND EXISTS (SELECT FROM deliveries d WHERE d.lane = %(lane)s AND d.state = '{_PENDING}' AND d.inline = %(inline)s)
ON CONFLICT (lane) DO UPDATE
SET owner = excluded.owner, epoch = l.epoch + 1, lease_until = excluded.lease_until,
    state = '{_READY}', ready_at = NULL
WHERE {lane_free("l")}
RETURNING epoch"""

_RENEW: Final = """
UPDATE lanes l SET lease_until = now() + make_interval(secs => %(seconds)s)
FROM (SELECT h.lane FROM unnest(%(lanes)s::text[], %(epochs)s::bigint[]) AS h(lane, epoch)
      JOIN lanes o ON o.lane = h.lane AND o.epoch = h.epoch AND o.owner = %(owner)s
      ORDER BY h.lane FOR NO KEY UPDATE OF o SKIP LOCKED) mine
WHERE l.lane = mine.lane RETURNING l.lane"""
_RENEW_ONE: Final = f"""
UPDATE lanes l SET lease_until = now() + make_interval(secs => %(seconds)s)
FROM set_config('lock_timeout', '{_LOCK_TIMEOUT}', true)
WHERE l.lane = %(lane)s AND l.epoch = %(epoch)s AND l.owner = %(owner)s RETURNING l.lane"""

_RELEASE: Final = """
UPDATE lanes l SET owner = NULL, lease_until = NULL
FROM unnest(%(lanes)s::text[], %(epochs)s::bigint[]) AS h(lane, epoch)
WHERE l.lane = h.lane AND l.epoch = h.epoch AND l.owner = %(owner)s"""

# Does not block: skips lanes that another process holds, is about to claim, or is recording an outcome for. All lanes
# are of one handler and one destination, so that one check tells whether they may run.
_CLAIM_SOME: Final = f"""
WITH asked AS (SELECT lane FROM unnest(%(lanes)s::text[]) AS u(lane)
               WHERE {HANDLER_ACTIVE}
                 AND EXISTS (SELECT FROM deliveries d
                             WHERE d.lane = u.lane AND d.state = '{_PENDING}' AND NOT d.inline)),
made AS (
    INSERT INTO lanes (lane, handler, destination_id, owner, epoch, lease_until)
    SELECT a.lane, %(handler)s, t.id, %(owner)s, 1, now() + make_interval(secs => %(seconds)s)
    FROM asked a JOIN destinations t ON t.name = %(destination)s
    WHERE NOT EXISTS (SELECT FROM lanes o WHERE o.lane = a.lane)
    ORDER BY a.lane ON CONFLICT (lane) DO NOTHING RETURNING lane, epoch),
free AS (
    SELECT l.lane FROM lanes l JOIN asked USING (lane)
    WHERE {lane_free("l")}
    ORDER BY l.lane FOR NO KEY UPDATE OF l SKIP LOCKED),
taken AS (
    UPDATE lanes l SET owner = %(owner)s, epoch = l.epoch + 1, state = '{_READY}', ready_at = NULL,
           lease_until = now() + make_interval(secs => %(seconds)s)
    FROM free WHERE l.lane = free.lane RETURNING l.lane, l.epoch)
SELECT lane, epoch FROM made UNION ALL SELECT lane, epoch FROM taken ORDER BY lane"""


def claim(connection: Connection, lane: str, owner: str, seconds: float, *, inline: bool = False) -> Lease | None:
    """Claim the lane for `seconds`. Returns None if another process holds it, or it is not ready, empty or
    paused.
    """
    values = {"lane": lane, "owner": owner, "seconds": seconds, "inline": inline}
    epoch = connection.exec_driver_sql(_CLAIM, values).scalar()
    return None if epoch is None else Lease(lane=lane, epoch=epoch, owner=owner)


def claim_some(connection: Connection, lanes: Sequence[str], owner: str, seconds: float) -> list[Lease]:
    """Claim those of the lanes that are free. All are of one handler at one destination. Returns leases in the order of
    names.
    """
    handler, destination, _ = lanes[0].split("/", 2)
    taken = connection.exec_driver_sql(
        _CLAIM_SOME,
        {
            "lanes": list(lanes),
            "lane": lanes[0],
            "handler": handler,
            "destination": destination,
            "owner": owner,
            "seconds": seconds,
        },
    )
    return [Lease(lane=lane, epoch=epoch, owner=owner) for lane, epoch in taken]


def renew(connection: Connection, owner: str, held: Mapping[str, int], seconds: float) -> set[str]:
    """Renew the leases of the lanes held (lane → epoch). Returns the lanes whose lease is known to be renewed.

    A lane that the commit of an outcome locks at this moment is left out: see `renew_one`.
    """
    return set(
        connection.exec_driver_sql(
            _RENEW, {"owner": owner, "lanes": list(held), "epochs": list(held.values()), "seconds": seconds}
        ).scalars()
    )


def renew_one(connection: Connection, lease: Lease, seconds: float) -> bool:
    """Renew one lease, waiting a second for its lock. Raises SQLAlchemyError after that."""
    return connection.exec_driver_sql(_RENEW_ONE, lease.values | {"seconds": seconds}).scalar() is not None


def release(connection: Connection, *leases: Lease) -> None:
    """Release these lanes of one owner, if the owner still holds them."""
    connection.exec_driver_sql(_RELEASE, by_column(leases))


def by_column(leases: Sequence[Lease]) -> dict[str, Any]:
    """Return the parameters of a statement that requires these leases of one owner."""
    return {
        "lanes": [lease.lane for lease in leases],
        "epochs": [lease.epoch for lease in leases],
        "owner": leases[0].owner,
    }
