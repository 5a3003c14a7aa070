"""Wake-ups: finds the lanes that need a worker, and defers the jobs that wake one.

A job only says that a lane may be ready: the rows of `deliveries` and `lanes` are authoritative.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import sqlstate
from receiver.states import DeliveryState
from receiver.storage.queue.lane_names import UNORDERED, is_unordered
from receiver.storage.queue.leases import lane_free

# States in SQL texts are literals: a partial index is not used for a parameter.
_PENDING: Final = DeliveryState.PENDING

_DUPLICATE: Final = "23505"  # unique_violation
# Up to this many lanes of one handler each have their own waiting job. Beyond that, one job covers all of them.
MAX_JOBS: Final = 16

# Goes from lane to lane, not from row to row: a lane costs one index step, whether it has one row or 100,000. The first
# delivery of a lane nearly always shows that a worker may run it. The full check is not made then, because the planner
# might read the whole table for it.
_DUE: Final = f"""
WITH RECURSIVE l(lane, inline, n) AS (
    (SELECT lane, inline, 1 FROM deliveries WHERE state = '{_PENDING}' AND lane > %(after)s ORDER BY lane, id LIMIT 1)
    UNION ALL
    SELECT next.lane, next.inline, n + 1
    FROM l CROSS JOIN LATERAL (
        SELECT d.lane, d.inline FROM deliveries d WHERE d.state = '{_PENDING}' AND d.lane > l.lane
        ORDER BY d.lane, d.id LIMIT 1) next
    WHERE n < %(limit)s)
SELECT l.lane, split_part(l.lane, '/', 1) = ANY(%(handlers)s::text[])
  AND coalesce({lane_free("o")}, true)
  AND EXISTS (SELECT FROM subscriptions s JOIN destinations t ON t.id = s.destination_id
              WHERE s.handler = split_part(l.lane, '/', 1) AND t.name = split_part(l.lane, '/', 2)
                AND s.enabled AND s.paused_at IS NULL)
  AND NOT EXISTS (SELECT FROM procrastinate.procrastinate_jobs j WHERE j.status = 'todo' AND j.queueing_lock = l.lane)
  AND NOT EXISTS (SELECT FROM procrastinate.procrastinate_jobs j WHERE j.status = 'doing' AND j.lock = l.lane)
  AND CASE WHEN l.lane ~ {UNORDERED}
      THEN EXISTS (SELECT FROM deliveries d WHERE d.state = '{_PENDING}' AND d.lane = l.lane AND d.lane ~ {UNORDERED}
                   AND d.ready_at IS NULL AND NOT d.inline)
        OR EXISTS (SELECT FROM deliveries d WHERE d.state = '{_PENDING}' AND d.lane = l.lane AND d.lane ~ {UNORDERED}
                   AND d.ready_at <= now() AND NOT d.inline)
      ELSE NOT l.inline
        OR EXISTS (SELECT FROM deliveries d WHERE d.state = '{_PENDING}' AND d.lane = l.lane AND NOT d.inline) END
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
    """Defer a job for the lane, unless one waits. Call it in a transaction that does nothing else."""
    _defer(connection, _DEFER, {"lane": lane})


def defer_many(connection: Connection, handler: str) -> None:
    """Defer a job that covers all lanes of the handler, unless one waits. See `many` and `defer`."""
    _defer(connection, _DEFER_MANY, {"handler": handler, "lane": f"{handler}/*"})


def _defer(connection: Connection, statement: str, values: dict[str, str]) -> None:
    try:
        connection.exec_driver_sql(statement, values)
    except SQLAlchemyError as exc:
        if sqlstate(exc) != _DUPLICATE:  # another process deferred one at the same moment
            raise


def many(argument: str) -> str | None:
    """Return the handler if the argument of a job covers all its lanes; None if it is the name of one lane."""
    handler, _, rest = argument.partition("/")
    return handler if rest == "*" else None


def wake(connection: Connection, names: Sequence[str]) -> None:
    """Defer jobs for these lanes: one for each lane, or one for a handler with many lanes."""
    by_handler: defaultdict[str, list[str]] = defaultdict(list)
    for lane in names:
        by_handler[lane.partition("/")[0]].append(lane)
    for handler, lanes in by_handler.items():
        # Unordered lanes are few, and run for long.
        single = [lane for lane in lanes if is_unordered(lane)]
        ordered = [lane for lane in lanes if not is_unordered(lane)]
        waiting = int(connection.exec_driver_sql(_WAITING_JOBS, {"handler": handler}).scalar_one()) if ordered else 0
        if waiting + len(ordered) > MAX_JOBS:
            defer_many(connection, handler)
        else:
            single += ordered
        for lane in single:
            defer(connection, lane)


def others_wait(connection: Connection, handlers: Sequence[str]) -> bool:
    """Return whether a lane of `handlers` waits for a free worker."""
    return bool(connection.exec_driver_sql(_OTHERS_WAIT, {"handlers": list(handlers)}).scalar())
