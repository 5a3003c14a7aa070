"""The outbox: queued requests to Redox, their claims, attempts and outcomes, and which of their lanes are due.

A lane is one API key and one destination at Redox, `@outbox/KEY/DESTINATION`; ids give the order of sending. Leases are
those of receiver.storage.queue.leases, in the same table, under names that no handler can have. All times come from the
database. A result is written only under the lease's epoch.

Must not send.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection

from receiver.states import OutboxState
from receiver.storage.queue.leases import Lease

# States in SQL texts are literals: a partial index is not used for a parameter.
_PENDING, _SENT, _DEAD, _HELD = OutboxState.PENDING, OutboxState.SENT, OutboxState.DEAD, OutboxState.HELD

# The Procrastinate queue of the lanes' jobs. No handler's name begins like this.
QUEUE: Final = "@outbox"
# Attempts without a usable answer, after which a request is dead: with pauses up to ten minutes, about two hours.
MAX_UNANSWERED: Final = 20
# What may stand in a lane's name unchanged: a UUID, a slug with its environment. Other values are replaced by a digest.
_PLAIN_NAME: Final = re.compile(r"[\w./-]{1,80}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRequest:
    """A request to store. `request` is sealed to `request_binding`. `lane` None: the caller sends it at once."""

    uuid: UUID
    api_key: str
    lane: str | None
    call: str
    kind: str
    message_uuid: UUID | None
    destination: str | None
    created_by: str
    request_key: str
    request: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuedRequest:
    """The next request of its lane. `lost`: an attempt began and its end was never recorded."""

    id: int
    uuid: UUID
    api_key: str
    call: str
    kind: str
    message_uuid: UUID | None
    destination: str | None
    attempts: int
    unanswered: int
    lost: bool
    request_key: str
    request: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutcome:
    """How an attempt ended. `pause`: seconds until the next; `unanswered`: Redox may have acted on it all the same.

    `answer` is sealed to `answer_binding`: the answer of Redox, or the errors of a refusal.
    """

    state: str
    status: int | None = None
    error_class: str | None = None
    log_ids: Sequence[str] = ()
    answer_key: str | None = None
    answer: bytes | None = field(default=None, repr=False)
    pause: float | None = None
    unanswered: bool = False


def lane(api_key: str, to: str) -> str:
    """Return the name of the lane of an API key and of `to`, a destination at Redox."""
    return (
        f"{QUEUE}/{api_key}/{to if _PLAIN_NAME.fullmatch(to) else sha256(to.encode(errors='replace')).hexdigest()[:32]}"
    )


def request_binding(uuid: UUID, api_key: str) -> str:
    """Return the binding to which a request is sealed: it can be sent only with the API key it was written for."""
    return f"outbound:{uuid}:{api_key}"


def answer_binding(uuid: UUID) -> str:
    """Return the binding to which an answer is sealed."""
    return f"outbound answer:{uuid}"


_PUT: Final = f"""
INSERT INTO outbound_requests (uuid, api_key, lane, call, kind, message_uuid, destination_id, created_by, request_key,
                               request, state, error_class, attempts, started_at)
SELECT %(uuid)s, %(api_key)s, %(lane)s, %(call)s, %(kind)s, %(message_uuid)s,
       (SELECT id FROM destinations WHERE name = %(destination)s), %(created_by)s, %(request_key)s, %(request)b,
       CASE WHEN %(lane)s::text IS NULL THEN '{_DEAD}' ELSE '{_PENDING}' END,
       CASE WHEN %(lane)s::text IS NULL THEN 'Unfinished' END, CASE WHEN %(lane)s::text IS NULL THEN 1 ELSE 0 END,
       CASE WHEN %(lane)s::text IS NULL THEN now() END
RETURNING id"""

# The lease is held, and stays held until this transaction ends.
_LEASE: Final = "SELECT FROM lanes WHERE lane = %(lane)s AND epoch = %(epoch)s AND owner = %(owner)s"

_CLAIM: Final = f"""
INSERT INTO lanes AS l (lane, handler, destination_id, owner, epoch, lease_until)
SELECT %(lane)s, '{QUEUE}', 0, %(owner)s, 1, now() + make_interval(secs => %(seconds)s)
FROM (SELECT ready_at FROM outbound_requests WHERE lane = %(lane)s AND state = '{_PENDING}' ORDER BY id LIMIT 1) head
WHERE coalesce(head.ready_at <= now(), true)
ON CONFLICT (lane) DO UPDATE SET owner = excluded.owner, epoch = l.epoch + 1, lease_until = excluded.lease_until
WHERE l.owner IS NULL OR l.lease_until < now()
RETURNING epoch"""

_HEAD: Final = f"""
SELECT * FROM (
    SELECT r.id, r.uuid, r.api_key, r.call, r.kind, r.message_uuid, d.name AS destination, r.attempts, r.unanswered,
           r.started_at IS NOT NULL AS lost, r.request_key, r.request, r.ready_at
    FROM outbound_requests r LEFT JOIN destinations d ON d.id = r.destination_id
    WHERE r.lane = %(lane)s AND r.state = '{_PENDING}' AND EXISTS ({_LEASE})
    ORDER BY r.id LIMIT 1) head
WHERE coalesce(ready_at <= now(), true)"""

# Counted before it is made, so that a crash counts. Redox may have acted on a lost attempt.
_START: Final = f"""
WITH held AS ({_LEASE} FOR NO KEY UPDATE)
UPDATE outbound_requests
SET attempts = attempts + 1, unanswered = unanswered + (started_at IS NOT NULL)::int, started_at = clock_timestamp(),
    epoch = %(epoch)s
WHERE id = %(id)s AND state = '{_PENDING}' AND EXISTS (SELECT FROM held)
RETURNING attempts"""

_SET_END: Final = f"""
SET state = %(state)s, status = %(status)s, error_class = %(error_class)s, log_ids = %(log_ids)s, started_at = NULL,
    answer_key = %(answer_key)s, answer = %(answer)b, ready_at = now() + make_interval(secs => %(pause)s::float8),
    unanswered = unanswered + %(unanswered)s::int,
    finished_at = CASE WHEN %(state)s <> '{_PENDING}' THEN clock_timestamp() END"""

_END: Final = f"""
WITH held AS ({_LEASE} FOR NO KEY UPDATE)
UPDATE outbound_requests {_SET_END}
WHERE id = %(id)s AND state = '{_PENDING}' AND attempts = %(attempt)s AND EXISTS (SELECT FROM held)"""

_END_DIRECT: Final = f"UPDATE outbound_requests {_SET_END} WHERE id = %(id)s AND lane IS NULL"

# Goes from lane to lane, not from row to row, however much is pending in each.
_DUE: Final = f"""
WITH RECURSIVE l(lane) AS (
    (SELECT lane FROM outbound_requests WHERE state = '{_PENDING}' ORDER BY lane LIMIT 1)
    UNION ALL
    SELECT (SELECT r.lane FROM outbound_requests r WHERE r.state = '{_PENDING}' AND r.lane > l.lane ORDER BY r.lane
            LIMIT 1)
    FROM l WHERE l.lane IS NOT NULL)
SELECT l.lane FROM l LEFT JOIN lanes o USING (lane)
CROSS JOIN LATERAL (SELECT ready_at FROM outbound_requests r WHERE r.lane = l.lane AND r.state = '{_PENDING}'
                    ORDER BY id LIMIT 1) head
WHERE coalesce(head.ready_at <= now(), true) AND coalesce(o.owner IS NULL OR o.lease_until < now(), true)
  AND NOT EXISTS (SELECT FROM procrastinate.procrastinate_jobs j WHERE j.status = 'todo' AND j.queueing_lock = l.lane)
  AND NOT EXISTS (SELECT FROM procrastinate.procrastinate_jobs j WHERE j.status = 'doing' AND j.lock = l.lane)
ORDER BY l.lane"""

_HOLD: Final = f"""
UPDATE outbound_requests SET state = '{_HELD}', ready_at = NULL, started_at = NULL, error_class = 'Restored'
WHERE state = '{_PENDING}'"""

_ANSWER: Final = f"SELECT answer_key, answer FROM outbound_requests WHERE uuid = %(uuid)s AND state = '{_SENT}'"


def put(connection: Connection, new: NewRequest) -> int:
    """Store a request, in the caller's transaction. Returns its id. Without a lane it counts as dead until its end is
    recorded.
    """
    values = {name: getattr(new, name) for name in NewRequest.__dataclass_fields__}
    return int(connection.exec_driver_sql(_PUT, values).scalar_one())


def claim(connection: Connection, lane: str, owner: str, seconds: float) -> Lease | None:
    """Claim the lane for `seconds`. Returns None if another process holds it, it is empty, or its first request
    waits.
    """
    epoch = connection.exec_driver_sql(_CLAIM, {"lane": lane, "owner": owner, "seconds": seconds}).scalar()
    return None if epoch is None else Lease(lane=lane, epoch=epoch, owner=owner)


def head(connection: Connection, lease: Lease) -> QueuedRequest | None:
    """Return the next request of the lane; None when the lease is lost, the lane is empty, or the request waits."""
    row = connection.exec_driver_sql(_HEAD, lease.values).mappings().one_or_none()
    return None if row is None else QueuedRequest(**{name: row[name] for name in QueuedRequest.__dataclass_fields__})


def start(connection: Connection, lease: Lease, number: int) -> int | None:
    """Count an attempt. Returns its number, or None: the lease is lost, or the request is no longer pending."""
    attempt = connection.exec_driver_sql(_START, lease.values | {"id": number}).scalar()
    return None if attempt is None else int(attempt)


def end(connection: Connection, lease: Lease, number: int, attempt: int, ended: RequestOutcome) -> bool:
    """Record how an attempt ended. Returns False when the lease is lost."""
    values = lease.values | _end_values(ended) | {"id": number, "attempt": attempt}
    return connection.exec_driver_sql(_END, values).rowcount == 1


def end_direct(connection: Connection, number: int, ended: RequestOutcome) -> None:
    """Record the end of a call that was made at once."""
    connection.exec_driver_sql(_END_DIRECT, _end_values(ended) | {"id": number})


def due(connection: Connection) -> list[str]:
    """Return the lanes that could send now and have no job."""
    return list(connection.exec_driver_sql(_DUE).scalars())


def hold(connection: Connection) -> int:
    """Hold every pending request: a restored database does not know what was sent since. Returns how many."""
    return connection.exec_driver_sql(_HOLD).rowcount


def answer(connection: Connection, uuid: UUID) -> tuple[str, bytes] | None:
    """Return (key id, sealed) of the answer to a request that was sent; None until there is an answer."""
    row = connection.exec_driver_sql(_ANSWER, {"uuid": uuid}).one_or_none()
    return None if row is None or row.answer is None else (row.answer_key, row.answer)


def _end_values(ended: RequestOutcome) -> dict[str, Any]:
    values = {name: getattr(ended, name) for name in RequestOutcome.__dataclass_fields__}
    return values | {"log_ids": list(ended.log_ids)}
