"""Outcomes: starts an attempt of a delivery, and records how it ended.

Every statement requires the lease of the lane. Must not know how a handler runs, nor decide what happens after a
failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import Connection

from receiver.states import DeliveryState, LaneState
from receiver.storage.queue.leases import HANDLER_ACTIVE, LEASE_HELD, Lease

# States in SQL texts are literals: a partial index is not used for a parameter.
_PENDING, _SUCCEEDED, _DEAD, _WAITING = (
    DeliveryState.PENDING,
    DeliveryState.SUCCEEDED,
    DeliveryState.DEAD,
    LaneState.WAITING,
)

# How long a run that has reported its outcome may take to commit it. One that is frozen in between loses its locks.
_COMMIT_TIMEOUT: Final = "5s"
# How far back `recently_dead` counts dead deliveries.
_RECENT: Final = "10 minutes"


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


# Counted before the run, so that a crash counts. The commit does not wait for the disk: if the server crashes, the
# attempt ends too.
_START: Final = f"""
WITH {LEASE_HELD}
UPDATE deliveries SET attempts = attempts + 1, started_at = clock_timestamp(), epoch = %(epoch)s
WHERE id = %(id)s AND state = '{_PENDING}' AND EXISTS (SELECT FROM held) AND {HANDLER_ACTIVE}
RETURNING attempts, set_config('synchronous_commit', 'off', true)"""

# The same, if the next delivery is in another lane.
_NEXT_LEASE: Final = """next_lease AS (
    SELECT 1 FROM lanes WHERE lane = %(next_lane)s AND epoch = %(next_epoch)s AND owner = %(owner)s FOR NO KEY UPDATE
    ),"""


def _succeed(next_lease: str = "", next_held: str = "") -> str:
    """Return the statement that ends one delivery and starts the next: a run costs one round trip and one commit."""
    return f"""
WITH {LEASE_HELD}, {next_lease}
begun AS (SELECT started_at, received_at FROM deliveries WHERE id = %(id)s),
done AS (
    UPDATE deliveries SET state = '{_SUCCEEDED}', finished_at = clock_timestamp(), started_at = NULL, ready_at = NULL,
           error_class = NULL, error_frames = NULL, error_sealed = NULL, error_key = NULL, error_shown = NULL
    WHERE id = %(id)s AND state = '{_PENDING}' AND attempts = %(attempt)s AND EXISTS (SELECT FROM held) RETURNING id),
attempt AS (
    INSERT INTO delivery_attempts (delivery_id, received_at, attempt, epoch, worker, started_at, ended_at, outcome)
    SELECT id, received_at, %(attempt)s, %(epoch)s, %(owner)s, coalesce(started_at, now()), clock_timestamp(),
           '{_SUCCEEDED}'
    FROM done, begun),
next AS (
    UPDATE deliveries SET attempts = attempts + 1, started_at = clock_timestamp(), epoch = %(next_epoch)s
    WHERE id = %(next)s AND state = '{_PENDING}' AND EXISTS (SELECT FROM done) {next_held}
      AND {HANDLER_ACTIVE} RETURNING attempts)
SELECT (SELECT count(*) FROM done), (SELECT attempts FROM next),
       set_config('idle_in_transaction_session_timeout', '{_COMMIT_TIMEOUT}', true)"""


_SUCCEED: Final = _succeed()
_SUCCEED_NEXT_LANE: Final = _succeed(_NEXT_LEASE, "AND EXISTS (SELECT FROM next_lease)")

_FAIL: Final = f"""
WITH {LEASE_HELD},
begun AS (SELECT started_at, received_at FROM deliveries WHERE id = %(id)s),
done AS (
    UPDATE deliveries SET state = %(state)s::text, attempts = attempts - %(uncount)s, started_at = NULL,
           ready_at = now() + make_interval(secs => %(pause)s::float8),
           deferred_since = CASE WHEN %(deferred)s::boolean THEN coalesce(deferred_since, now())
                                 ELSE deferred_since END,
           error_class = %(error_class)s::text, error_frames = %(error_frames)s::text[],
           error_sealed = %(error_sealed)s::bytea, error_key = %(error_key)s::text,
           error_shown = %(error_shown)s::text,
           finished_at = CASE WHEN %(state)s::text = '{_DEAD}' THEN clock_timestamp() END
    WHERE id = %(id)s AND state = '{_PENDING}' AND attempts = %(attempt)s AND EXISTS (SELECT FROM held) RETURNING id),
attempt AS (
    INSERT INTO delivery_attempts
           (delivery_id, received_at, attempt, epoch, worker, started_at, ended_at, outcome, error_class, error_frames)
    SELECT id, received_at, %(attempt)s, %(epoch)s, %(owner)s, coalesce(started_at, now()), clock_timestamp(),
           %(outcome)s::text, %(error_class)s::text, %(error_frames)s::text[]
    FROM done, begun),
lane AS (
    UPDATE lanes SET state = coalesce(%(lane_state)s::text, state),
           ready_at = CASE WHEN %(lane_state)s::text = '{_WAITING}'
                           THEN now() + make_interval(secs => %(pause)s::float8) ELSE ready_at END,
           owner = CASE WHEN NOT %(release)s::boolean THEN owner END,
           lease_until = CASE WHEN NOT %(release)s::boolean THEN lease_until END
    WHERE lane = %(lane)s AND (%(lane_state)s::text IS NOT NULL OR %(release)s::boolean) AND EXISTS (SELECT FROM done))
SELECT count(*) FROM done"""


def start(connection: Connection, lease: Lease, delivery: int) -> int | None:
    """Count an attempt. Returns its number, or None: the lease is lost, the handler paused, or the delivery not
    pending.
    """
    row = connection.exec_driver_sql(_START, lease.values | {"id": delivery}).first()
    return None if row is None else int(row[0])


def succeed(
    connection: Connection,
    lease: Lease,
    delivery: int,
    attempt: int,
    *,
    following: int | None,
    next_lease: Lease | None = None,
) -> tuple[bool, int | None]:
    """Record the success, and start the next delivery. Returns (recorded, the attempt of the next delivery or None).

    `next_lease`: the lease of the next delivery, if it is in another lane of the same owner, handler and destination.
    If the success is not recorded, the lease is lost: roll back everything in the transaction.
    """
    after = next_lease or lease
    done, started, _ = connection.exec_driver_sql(
        _SUCCEED if after == lease else _SUCCEED_NEXT_LANE,
        lease.values
        | {"id": delivery, "attempt": attempt, "next": following, "next_lane": after.lane, "next_epoch": after.epoch},
    ).one()
    return bool(done), started


def fail(connection: Connection, lease: Lease, delivery: int, attempt: int, failure: DeliveryFailure) -> bool:
    """Record a failure. Returns False when the lease is lost, or the end of this attempt is already recorded."""
    return bool(
        connection.exec_driver_sql(
            _FAIL,
            lease.values
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


_MANY_DEAD: Final = f"""
SELECT count(*) FROM deliveries d JOIN destinations t ON t.id = d.destination_id AND t.name = %(destination)s
WHERE d.handler = %(handler)s AND d.state = '{_DEAD}' AND d.finished_at > now() - interval '{_RECENT}'
  AND d.error_class = %(error_class)s"""


def recently_dead(connection: Connection, handler: str, destination: str, error_class: str) -> int:
    """Return how many of the handler's deliveries died of the same error class within the last ten minutes."""
    return int(
        connection.exec_driver_sql(
            _MANY_DEAD, {"handler": handler, "destination": destination, "error_class": error_class}
        ).scalar_one()
    )
