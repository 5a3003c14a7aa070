"""Deliveries and lanes: claims, leases, attempts, outcomes, and which lanes need a worker.

The rows of `deliveries` and `lanes` are the truth; a lane without a row is ready. All times come from the database,
because the clocks of hosts differ. A run's results are written only while its `Lease` is held under the same epoch: a
host that was frozen and resumes writes nothing.

Must not know how a handler runs, nor decide what happens after a failure.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, CursorResult
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import sqlstate
from receiver.errors import IntegrityError
from receiver.storage.evidence.macs import COLUMNS, RowMacs

# Unordered lanes, in which no delivery waits for an earlier one: `handler/destination/any:N`.
_UNORDERED: Final = "'^[^/]+/[^/]+/any:'"
_UNORDERED_LANE: Final = re.compile(_UNORDERED.strip("'"))
_DUPLICATE: Final = "23505"
# Up to this many lanes of one handler each have their own waiting job. Beyond that, one job covers all of them.
MAX_JOBS: Final = 16
# How many deliveries a handler process reads from each lane when it has many lanes.
HEADS: Final = 8
# How many deliveries it reads ahead from a single lane.
BATCH_ROWS: Final = 64
BATCH_BYTES: Final = 4 * 1024 * 1024
# How long a run that has reported its outcome may take to commit it. One that is frozen in between loses its locks.
_COMMIT_TIMEOUT: Final = "5s"
# How long a lease renewal waits for a lane that the commit of an outcome locks.
_LOCK_TIMEOUT: Final = "1s"
# The message fields that its MAC covers.
_SIGNED: Final = (*COLUMNS["messages"], "mac", "mac_key")
# How far back `recently_dead` counts dead deliveries.
_RECENT: Final = "10 minutes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A lease: the lane, its owner (the name of a worker or receiver process) and its epoch."""

    lane: str
    epoch: int
    owner: str

    @property
    def _values(self) -> dict[str, Any]:
        return {"lane": self.lane, "epoch": self.epoch, "owner": self.owner}


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
    sha256: bytes
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


@dataclass(frozen=True, kw_only=True, slots=True)
class DeliveryFailure:
    """The end of an attempt that did not succeed, and the new state of the delivery. `pause`: seconds; None: no pause.

    `error_sealed`: the error's text, sealed to `delivery_binding`. `error_shown`: the same text, if the receiver itself
    wrote it. `lane_state`: None leaves the lane unchanged. `release`: the lease ends too.
    """

    outcome: str
    state: str
    error_class: str
    error_frames: Sequence[str] = ()
    error_key: str | None = None
    error_sealed: bytes | None = field(default=None, repr=False)
    error_shown: str | None = None
    pause: float | None = None
    counted: bool = True
    deferred: bool = False
    lane_state: str | None = None
    release: bool = False


def delivery_binding(delivery: int) -> str:
    """Return the binding to which the text of a delivery's error is sealed."""
    return f"delivery:{delivery}"


# The handler is bound to the destination and not paused. Checked before every start, so that a pause takes effect at
# once.
_ACTIVE: Final = """EXISTS (
    SELECT FROM subscriptions s JOIN destinations t ON t.id = s.destination_id
    WHERE s.handler = split_part(%(lane)s, '/', 1) AND t.name = split_part(%(lane)s, '/', 2)
      AND s.enabled AND s.paused_at IS NULL)"""
# The lease is held, and stays held until this transaction ends.
_LEASE: Final = """fence AS (
    SELECT 1 FROM lanes WHERE lane = %(lane)s AND epoch = %(epoch)s AND owner = %(owner)s FOR NO KEY UPDATE)"""

_CLAIM: Final = """
INSERT INTO lanes AS l (lane, handler, destination_id, owner, epoch, lease_until)
SELECT %(lane)s, s.handler, s.destination_id, %(owner)s, 1, now() + make_interval(secs => %(lease)s)
FROM subscriptions s JOIN destinations t ON t.id = s.destination_id
WHERE s.handler = split_part(%(lane)s, '/', 1) AND t.name = split_part(%(lane)s, '/', 2)
  AND s.enabled AND s.paused_at IS NULL
  AND EXISTS (SELECT FROM deliveries d WHERE d.lane = %(lane)s AND d.state = 'pending' AND d.inline = %(inline)s)
ON CONFLICT (lane) DO UPDATE
SET owner = excluded.owner, epoch = l.epoch + 1, lease_until = excluded.lease_until, state = 'ready', ready_at = NULL
WHERE (l.owner IS NULL OR l.lease_until < now())
  AND (l.state = 'ready' OR l.state = 'waiting' AND l.ready_at <= now())
RETURNING epoch"""

_RENEW: Final = """
UPDATE lanes l SET lease_until = now() + make_interval(secs => %(lease)s)
FROM (SELECT h.lane FROM unnest(%(lanes)s::text[], %(epochs)s::bigint[]) AS h(lane, epoch)
      JOIN lanes o ON o.lane = h.lane AND o.epoch = h.epoch AND o.owner = %(owner)s
      ORDER BY h.lane FOR NO KEY UPDATE OF o SKIP LOCKED) mine
WHERE l.lane = mine.lane RETURNING l.lane"""
_RENEW_ONE: Final = f"""
UPDATE lanes l SET lease_until = now() + make_interval(secs => %(lease)s)
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
               WHERE {_ACTIVE} AND EXISTS (SELECT FROM deliveries d WHERE d.lane = u.lane AND d.state = 'pending'
                                           AND NOT d.inline)),
made AS (
    INSERT INTO lanes (lane, handler, destination_id, owner, epoch, lease_until)
    SELECT a.lane, %(handler)s, t.id, %(owner)s, 1, now() + make_interval(secs => %(lease)s)
    FROM asked a JOIN destinations t ON t.name = %(destination)s
    WHERE NOT EXISTS (SELECT FROM lanes o WHERE o.lane = a.lane)
    ORDER BY a.lane ON CONFLICT (lane) DO NOTHING RETURNING lane, epoch),
free AS (
    SELECT l.lane FROM lanes l JOIN asked USING (lane)
    WHERE (l.owner IS NULL OR l.lease_until < now())
      AND (l.state = 'ready' OR l.state = 'waiting' AND l.ready_at <= now())
    ORDER BY l.lane FOR NO KEY UPDATE OF l SKIP LOCKED),
taken AS (
    UPDATE lanes l SET owner = %(owner)s, epoch = l.epoch + 1, state = 'ready', ready_at = NULL,
           lease_until = now() + make_interval(secs => %(lease)s)
    FROM free WHERE l.lane = free.lane RETURNING l.lane, l.epoch)
SELECT lane, epoch FROM made UNION ALL SELECT lane, epoch FROM taken ORDER BY lane"""


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
           m.received_at, m.test, m.destination_id, m.credential_ids, m.query, m.attempt_id, m.peer, m.sha256, m.size,
           m.content_type, m.mac, m.mac_key, d.destination_id AS delivery_destination, l.id AS lane_destination,
           sum(m.size) OVER (ORDER BY d.place, d.id) - m.size AS before, d.place
    FROM chosen d JOIN messages m ON m.id = d.message_id JOIN destinations l ON l.name = split_part(d.lane, '/', 2)
    WHERE {held} AND {_ACTIVE})
SELECT h.place, h.id, h.attempts, h.generation, h.lost, h.deferred_for, h.uuid, h.kind, h.source_id, h.log_id,
       h.message_id, h.transmission_id, h.facility, h.event_time, h.received_at, h.test, p.payload_key, p.sealed,
       h.destination_id, h.credential_ids, h.query, h.attempt_id, h.peer, h.sha256, h.size, h.content_type, h.mac,
       h.mac_key, h.delivery_destination, h.lane_destination
FROM head h LEFT JOIN payloads p ON p.message_id = h.number AND p.received_at = h.received_at
WHERE h.before < {BATCH_BYTES} ORDER BY h.place, h.id"""


# `id >`: the index scan starts after the deliveries that are done.
_BATCH: Final = _batch(f"""
    SELECT d.*, 0 AS place FROM deliveries d
    WHERE lane = %(lane)s AND state = 'pending' AND inline = %(inline)s AND id > %(after)s
      AND (%(up_to)s = 0 OR id <= %(up_to)s)
    ORDER BY id LIMIT {BATCH_ROWS}""")
# Deliveries whose pause is over come before those that never ran. These are two index scans, because a single one would
# step over every delivery that still waits.
_BATCH_UNORDERED: Final = _batch(f"""
    (SELECT d.*, 0 AS place FROM deliveries d
     WHERE lane = %(lane)s AND state = 'pending' AND lane ~ {_UNORDERED} AND inline = %(inline)s AND id <> %(after)s
       AND ready_at <= now() ORDER BY ready_at LIMIT {BATCH_ROWS})
    UNION ALL
    (SELECT d.*, 1 AS place FROM deliveries d
     WHERE lane = %(lane)s AND state = 'pending' AND lane ~ {_UNORDERED} AND inline = %(inline)s AND id <> %(after)s
       AND ready_at IS NULL ORDER BY id LIMIT {BATCH_ROWS})""")
# The first deliveries of each of many lanes.
_HEADS: Final = _batch(
    f"""
    SELECT d.*, o.place FROM unnest(%(lanes)s::text[], %(epochs)s::bigint[]) WITH ORDINALITY AS o(lane, epoch, place)
    JOIN lanes l ON l.lane = o.lane AND l.epoch = o.epoch AND l.owner = %(owner)s
    CROSS JOIN LATERAL (SELECT * FROM deliveries WHERE lane = o.lane AND state = 'pending' AND NOT inline
                        ORDER BY id LIMIT {HEADS}) d""",
    held="true",
)

# Counted before the run, so that a crash counts. The commit does not wait for the disk: if the server crashes, the
# attempt ends too.
_START: Final = f"""
WITH {_LEASE}
UPDATE deliveries SET attempts = attempts + 1, started_at = clock_timestamp(), epoch = %(epoch)s
WHERE id = %(id)s AND state = 'pending' AND EXISTS (SELECT FROM fence) AND {_ACTIVE}
RETURNING attempts, set_config('synchronous_commit', 'off', true)"""

# The same, if the next delivery is in another lane.
_NEXT_LEASE: Final = """next_lease AS (
    SELECT 1 FROM lanes WHERE lane = %(next_lane)s AND epoch = %(next_epoch)s AND owner = %(owner)s FOR NO KEY UPDATE
    ),"""


def _succeed(next_lease: str = "", held: str = "") -> str:
    """Return the statement that ends one delivery and starts the next: a run costs one round trip and one commit."""
    return f"""
WITH {_LEASE}, {next_lease}
begun AS (SELECT started_at FROM deliveries WHERE id = %(id)s),
done AS (
    UPDATE deliveries SET state = 'succeeded', finished_at = clock_timestamp(), started_at = NULL, ready_at = NULL,
           error_class = NULL, error_frames = NULL, error_sealed = NULL, error_key = NULL, error_shown = NULL
    WHERE id = %(id)s AND state = 'pending' AND attempts = %(attempt)s AND EXISTS (SELECT FROM fence) RETURNING id),
attempt AS (
    INSERT INTO delivery_attempts (delivery_id, attempt, epoch, worker, started_at, ended_at, outcome)
    SELECT id, %(attempt)s, %(epoch)s, %(owner)s, coalesce(started_at, now()), clock_timestamp(), 'succeeded'
    FROM done, begun),
next AS (
    UPDATE deliveries SET attempts = attempts + 1, started_at = clock_timestamp(), epoch = %(next_epoch)s
    WHERE id = %(next)s AND state = 'pending' AND EXISTS (SELECT FROM done) {held}
      AND {_ACTIVE} RETURNING attempts)
SELECT (SELECT count(*) FROM done), (SELECT attempts FROM next),
       set_config('idle_in_transaction_session_timeout', '{_COMMIT_TIMEOUT}', true)"""


_SUCCEED: Final = _succeed()
_SUCCEED_NEXT_LANE: Final = _succeed(_NEXT_LEASE, "AND EXISTS (SELECT FROM next_lease)")

_FAIL: Final = f"""
WITH {_LEASE},
begun AS (SELECT started_at FROM deliveries WHERE id = %(id)s),
done AS (
    UPDATE deliveries SET state = %(state)s::text, attempts = attempts - %(uncount)s, started_at = NULL,
           ready_at = now() + make_interval(secs => %(pause)s::float8),
           deferred_since = CASE WHEN %(deferred)s::boolean THEN coalesce(deferred_since, now())
                                 ELSE deferred_since END,
           error_class = %(error_class)s::text, error_frames = %(error_frames)s::text[],
           error_sealed = %(error_sealed)s::bytea, error_key = %(error_key)s::text,
           error_shown = %(error_shown)s::text,
           finished_at = CASE WHEN %(state)s::text = 'dead' THEN clock_timestamp() END
    WHERE id = %(id)s AND state = 'pending' AND attempts = %(attempt)s AND EXISTS (SELECT FROM fence) RETURNING id),
attempt AS (
    INSERT INTO delivery_attempts
           (delivery_id, attempt, epoch, worker, started_at, ended_at, outcome, error_class, error_frames)
    SELECT id, %(attempt)s, %(epoch)s, %(owner)s, coalesce(started_at, now()), clock_timestamp(), %(outcome)s::text,
           %(error_class)s::text, %(error_frames)s::text[]
    FROM done, begun),
lane AS (
    UPDATE lanes SET state = coalesce(%(lane_state)s::text, state),
           ready_at = CASE WHEN %(lane_state)s::text = 'waiting' THEN now() + make_interval(secs => %(pause)s::float8)
                           ELSE ready_at END,
           owner = CASE WHEN NOT %(release)s::boolean THEN owner END,
           lease_until = CASE WHEN NOT %(release)s::boolean THEN lease_until END
    WHERE lane = %(lane)s AND (%(lane_state)s::text IS NOT NULL OR %(release)s::boolean) AND EXISTS (SELECT FROM done))
SELECT count(*) FROM done"""


def claim(connection: Connection, lane: str, owner: str, lease: float, *, inline: bool = False) -> Lease | None:
    """Claim the lane for `lease` seconds. Returns None if another process holds it, or it is not ready, empty or
    paused.
    """
    values = {"lane": lane, "owner": owner, "lease": lease, "inline": inline}
    epoch = connection.exec_driver_sql(_CLAIM, values).scalar()
    return None if epoch is None else Lease(lane=lane, epoch=epoch, owner=owner)


def claim_some(connection: Connection, lanes: Sequence[str], owner: str, lease: float) -> list[Lease]:
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
            "lease": lease,
        },
    )
    return [Lease(lane=lane, epoch=epoch, owner=owner) for lane, epoch in taken]


def renew(connection: Connection, owner: str, held: Mapping[str, int], lease: float) -> set[str]:
    """Renew the leases of the lanes held (lane → epoch). Returns the lanes whose lease is known to be renewed.

    A lane that the commit of an outcome locks at this moment is left out: see `renew_one`.
    """
    return set(
        connection.exec_driver_sql(
            _RENEW, {"owner": owner, "lanes": list(held), "epochs": list(held.values()), "lease": lease}
        ).scalars()
    )


def renew_one(connection: Connection, fence: Lease, lease: float) -> bool:
    """Renew one lease, waiting a second for its lock. Raises SQLAlchemyError after that."""
    return connection.exec_driver_sql(_RENEW_ONE, fence._values | {"lease": lease}).scalar() is not None


def release(connection: Connection, *fences: Lease) -> None:
    """Release these lanes of one owner, if the owner still holds them."""
    connection.exec_driver_sql(_RELEASE, _together(fences))


def batch(
    connection: Connection,
    fence: Lease,
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
        _BATCH_UNORDERED if unordered else _BATCH, fence._values | {"after": after, "inline": inline, "up_to": up_to}
    )
    return [WaitingDelivery(**each) for _, each in _placed(rows)]


def heads(connection: Connection, fences: Sequence[Lease]) -> list[list[WaitingDelivery]]:
    """Return the next few deliveries of each of these ordered lanes of one handler and owner, as one list for each
    lane.

    A list is empty when the lease is lost, the handler is paused, or the payloads of earlier lanes are too large.
    """
    found: list[list[WaitingDelivery]] = [[] for _ in fences]
    rows = connection.exec_driver_sql(_HEADS, _together(fences) | {"lane": fences[0].lane})
    for place, each in _placed(rows):
        found[place - 1].append(WaitingDelivery(**each))
    return found


def _together(fences: Sequence[Lease]) -> dict[str, Any]:
    return {
        "lanes": [fence.lane for fence in fences],
        "epochs": [fence.epoch for fence in fences],
        "owner": fences[0].owner,
    }


def _placed(rows: CursorResult[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    for row in rows.mappings():
        values = dict(row)
        yield values.pop("place"), values


def start(connection: Connection, fence: Lease, delivery: int) -> int | None:
    """Count an attempt. Returns its number, or None: the lease is lost, the handler paused, or the delivery not
    pending.
    """
    row = connection.exec_driver_sql(_START, fence._values | {"id": delivery}).first()
    return None if row is None else int(row[0])


def succeed(
    connection: Connection,
    fence: Lease,
    delivery: int,
    attempt: int,
    *,
    following: int | None,
    next_lease: Lease | None = None,
) -> tuple[bool, int | None]:
    """Record the success, and start the next delivery. Returns (recorded, the attempt of the next delivery or None).

    `next_lease`: the lease of the next delivery, if it is in another lane of the same owner, handler and destination. If
    the success is not recorded, the lease is lost: roll back everything in the transaction.
    """
    after = next_lease or fence
    done, started, _ = connection.exec_driver_sql(
        _SUCCEED if after == fence else _SUCCEED_NEXT_LANE,
        fence._values
        | {"id": delivery, "attempt": attempt, "next": following, "next_lane": after.lane, "next_epoch": after.epoch},
    ).one()
    return bool(done), started


def fail(connection: Connection, fence: Lease, delivery: int, attempt: int, failure: DeliveryFailure) -> bool:
    """Record a failure. Returns False when the lease is lost, or the end of this attempt is already recorded."""
    return bool(
        connection.exec_driver_sql(
            _FAIL,
            fence._values
            | {
                "id": delivery,
                "attempt": attempt,
                "outcome": failure.outcome,
                "state": failure.state,
                "uncount": 0 if failure.counted else 1,
                "pause": failure.pause,
                "deferred": failure.deferred,
                "error_class": failure.error_class,
                "error_frames": list(failure.error_frames),
                "error_sealed": failure.error_sealed,
                "error_key": failure.error_key,
                "error_shown": failure.error_shown,
                "lane_state": failure.lane_state,
                "release": failure.release,
            },
        ).scalar()
    )


# --- dead deliveries

_MANY_DEAD: Final = f"""
SELECT count(*) FROM deliveries d JOIN destinations t ON t.id = d.destination_id AND t.name = %(destination)s
WHERE d.handler = %(handler)s AND d.state = 'dead' AND d.finished_at > now() - interval '{_RECENT}'
  AND d.error_class = %(error_class)s"""


def recently_dead(connection: Connection, handler: str, destination: str, error_class: str) -> int:
    """Return how many of the handler's deliveries died of the same error class within the last ten minutes."""
    return int(
        connection.exec_driver_sql(
            _MANY_DEAD, {"handler": handler, "destination": destination, "error_class": error_class}
        ).scalar_one()
    )


# --- which lanes need a worker

# Goes from lane to lane, not from row to row: a lane costs one index step, whether it has one row or 100,000. The first
# delivery of a lane nearly always shows that a worker may run it. The full check is not made then, because the planner
# might read the whole table for it.
_DUE: Final = f"""
WITH RECURSIVE l(lane, inline, n) AS (
    (SELECT lane, inline, 1 FROM deliveries WHERE state = 'pending' AND lane > %(after)s ORDER BY lane, id LIMIT 1)
    UNION ALL
    SELECT next.lane, next.inline, n + 1
    FROM l CROSS JOIN LATERAL (SELECT d.lane, d.inline FROM deliveries d WHERE d.state = 'pending' AND d.lane > l.lane
                               ORDER BY d.lane, d.id LIMIT 1) next
    WHERE n < %(limit)s)
SELECT l.lane, split_part(l.lane, '/', 1) = ANY(%(handlers)s::text[])
  AND coalesce((o.owner IS NULL OR o.lease_until < now())
               AND (o.state = 'ready' OR o.state = 'waiting' AND o.ready_at <= now()), true)
  AND EXISTS (SELECT FROM subscriptions s JOIN destinations t ON t.id = s.destination_id
              WHERE s.handler = split_part(l.lane, '/', 1) AND t.name = split_part(l.lane, '/', 2)
                AND s.enabled AND s.paused_at IS NULL)
  AND NOT EXISTS (SELECT FROM procrastinate.procrastinate_jobs j WHERE j.status = 'todo' AND j.queueing_lock = l.lane)
  AND NOT EXISTS (SELECT FROM procrastinate.procrastinate_jobs j WHERE j.status = 'doing' AND j.lock = l.lane)
  AND CASE WHEN l.lane ~ {_UNORDERED}
      THEN EXISTS (SELECT FROM deliveries d WHERE d.state = 'pending' AND d.lane = l.lane AND d.lane ~ {_UNORDERED}
                   AND d.ready_at IS NULL AND NOT d.inline)
        OR EXISTS (SELECT FROM deliveries d WHERE d.state = 'pending' AND d.lane = l.lane AND d.lane ~ {_UNORDERED}
                   AND d.ready_at <= now() AND NOT d.inline)
      ELSE NOT l.inline
        OR EXISTS (SELECT FROM deliveries d WHERE d.state = 'pending' AND d.lane = l.lane AND NOT d.inline) END
FROM l LEFT JOIN lanes o USING (lane) ORDER BY l.n"""

# Procrastinate's own function. It needs its schema first in the search path, which is set for this transaction only.
# The job is looked up first, because a duplicate is an error, which PostgreSQL logs; only a race causes one.
_DEFER: Final = """
SELECT procrastinate.procrastinate_defer_jobs_v1(ARRAY[ROW(
           split_part(%(lane)s, '/', 1), 'lane', 0, %(lane)s, %(lane)s, jsonb_build_object('lane', %(lane)s::text), NULL
       )::procrastinate.procrastinate_job_to_defer_v1])
FROM set_config('search_path', 'procrastinate, ' || current_setting('search_path'), true)
WHERE NOT EXISTS (
    SELECT FROM procrastinate.procrastinate_jobs WHERE status = 'todo' AND queueing_lock = %(lane)s)"""

# One job, without a lock, covers many lanes of one handler: each free worker takes it in turn and scans for lanes. Jobs
# are counted only up to the limit.
_DEFER_MANY: Final = """
SELECT procrastinate.procrastinate_defer_jobs_v1(ARRAY[ROW(
           %(handler)s, 'lane', 0, NULL, %(lane)s, jsonb_build_object('lane', %(lane)s::text), NULL
       )::procrastinate.procrastinate_job_to_defer_v1])
FROM set_config('search_path', 'procrastinate, ' || current_setting('search_path'), true)
WHERE NOT EXISTS (
    SELECT FROM procrastinate.procrastinate_jobs WHERE status = 'todo' AND queueing_lock = %(lane)s)"""
_WAITING_JOBS: Final = f"""
SELECT count(*) FROM (SELECT FROM procrastinate.procrastinate_jobs
                      WHERE status = 'todo' AND queue_name = %(handler)s LIMIT {MAX_JOBS}) AS few"""

_OTHERS_WAIT: Final = """
SELECT EXISTS (
    SELECT FROM procrastinate.procrastinate_jobs j
    WHERE j.status = 'todo' AND j.queue_name = ANY(%(handlers)s::text[])
      AND NOT EXISTS (SELECT FROM procrastinate.procrastinate_jobs r WHERE r.status = 'doing' AND r.lock = j.lock))"""


def due(connection: Connection, handlers: Sequence[str], *, after: str, limit: int) -> tuple[list[str], str]:
    """Scan the next `limit` lanes with pending deliveries after the lane `after`.

    Returns those of `handlers` that could run now and have no job, and the last lane scanned ("" at the end).
    """
    rows = connection.exec_driver_sql(_DUE, {"handlers": list(handlers), "after": after, "limit": limit}).all()
    return [lane for lane, wanted in rows if wanted], rows[-1][0] if len(rows) == limit else ""


def defer(connection: Connection, lane: str) -> None:
    """Defer a job for the lane, unless one waits. Call it in a transaction that does nothing else.

    Raises SQLAlchemyError with SQLSTATE 23505 when another process deferred one at the same moment.
    """
    connection.exec_driver_sql(_DEFER, {"lane": lane})


def defer_many(connection: Connection, handler: str) -> None:
    """Defer a job that covers all lanes of the handler, unless one waits. Argument: see `many`."""
    connection.exec_driver_sql(_DEFER_MANY, {"handler": handler, "lane": f"{handler}/*"})


def many(argument: str) -> str | None:
    """Return the handler if the argument of a job covers all its lanes; None if it is the name of one lane."""
    handler, _, rest = argument.partition("/")
    return handler if rest == "*" else None


def wake(connection: Connection, names: Sequence[str]) -> None:
    """Defer jobs for these lanes: one for each lane, or one for a handler with many lanes.

    As `defer`, but a job that another process deferred at the same moment is not an error.
    """
    by_handler: defaultdict[str, list[str]] = defaultdict(list)
    for lane in names:
        by_handler[lane.partition("/")[0]].append(lane)
    for handler, lanes in by_handler.items():
        # Unordered lanes are few, and run for long.
        single = [lane for lane in lanes if _UNORDERED_LANE.match(lane)]
        ordered = [lane for lane in lanes if not _UNORDERED_LANE.match(lane)]
        waiting = int(connection.exec_driver_sql(_WAITING_JOBS, {"handler": handler}).scalar_one()) if ordered else 0
        if waiting + len(ordered) > MAX_JOBS:
            _unless_done(defer_many, connection, handler)
        else:
            single += ordered
        for lane in single:
            _unless_done(defer, connection, lane)


def _unless_done(act: Callable[[Connection, str], None], connection: Connection, argument: str) -> None:
    try:
        act(connection, argument)
    except SQLAlchemyError as exc:
        if sqlstate(exc) != _DUPLICATE:
            raise


def others_wait(connection: Connection, handlers: Sequence[str]) -> bool:
    """Return whether a lane of `handlers` waits for a free worker."""
    return bool(connection.exec_driver_sql(_OTHERS_WAIT, {"handlers": list(handlers)}).scalar())


# --- inline deliveries, which run within a request

_INLINE: Final = "SELECT lane, state FROM deliveries WHERE id = %(id)s AND inline"
_DEMOTE: Final = """
UPDATE deliveries SET inline = false WHERE lane = %(lane)s AND state = 'pending' AND inline RETURNING id"""
_BEFORE: Final = """
SELECT EXISTS (SELECT FROM deliveries WHERE lane = %(lane)s AND state = 'pending' AND NOT inline AND id < %(id)s)"""


def inline_delivery(connection: Connection, delivery: int) -> tuple[str, bool] | None:
    """Return (lane, whether it is still pending) of an inline delivery; None when the delivery is not inline."""
    row = connection.exec_driver_sql(_INLINE, {"id": delivery}).first()
    return None if row is None else (row.lane, row.state == "pending")


def hand_to_workers(connection: Connection, lane: str) -> None:
    """Make the pending inline deliveries ordinary ones: the handler no longer runs within the request."""
    connection.exec_driver_sql(_DEMOTE, {"lane": lane})


def workers_first(connection: Connection, lane: str, delivery: int) -> bool:
    """Return whether an earlier delivery of the lane is to be run by a worker."""
    return bool(connection.exec_driver_sql(_BEFORE, {"lane": lane, "id": delivery}).scalar())
