"""Problems of handlers: reports of worker and receiver processes, and deliveries that keep failing.

Must not hold the text of an error, which may quote a patient: only classes, places in code and fixed words. One query,
`problems`, serves `status`, `check` and `handlers list`, so that all three agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy import Connection

from receiver.states import DeliveryState

Kind = Literal["plugin_not_loaded", "handler_not_started", "responder_failed", "responder_late", "responder_missing"]

# A process that has not reported for this long is gone. Its rows are kept for a day.
_PROCESS_TIMEOUT: Final = "60 seconds"
_RETENTION: Final = "1 day"
# Failures of a responder are shown for this long, and only while the process that reported them runs.
_RECENT: Final = "1 hour"
# A handler that raises RetryLater is not failing. One that does so for longer than this may need an operator.
_DEFERRED: Final = "5 minutes"
# The first failure of a handler at a destination may be chance; this many are reported.
_MIN_FAILURES: Final = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class HandlerProblem:
    """A problem as a process reports it. An empty `destination` means all; an empty `handler`: none is bound to the
    query.

    `place`: module:line or file:line. `detail`: a sentence that the receiver wrote. `ago`: seconds since it was last
    seen. `message`: the UUID of the message that was handled.
    """

    kind: Kind
    handler: str
    destination: str = ""
    error_class: str | None = None
    place: str | None = None
    detail: str | None = None
    count: int = 1
    ago: float = 0.0
    message: UUID | None = None


_REPORT: Final = f"""
WITH given AS (
    SELECT * FROM unnest(%(kinds)s::text[], %(handlers)s::text[], %(destinations)s::text[], %(classes)s::text[],
                         %(places)s::text[], %(details)s::text[], %(counts)s::bigint[], %(agos)s::float8[],
                         %(messages)s::uuid[])
        AS g(kind, handler, destination, error_class, place, detail, count, ago, message_uuid)),
gone AS (
    DELETE FROM handler_problems p WHERE p.reported_at < now() - interval '{_RETENTION}'
        OR p.process = %(process)s AND NOT EXISTS (
            SELECT FROM given g WHERE (g.handler, g.destination, g.kind) = (p.handler, p.destination, p.kind)))
INSERT INTO handler_problems (process, host, handler, destination, kind, error_class, place, detail, count, last_at,
                              message_uuid)
SELECT %(process)s, %(host)s, handler, destination, kind, error_class, place, detail, count,
       now() - make_interval(secs => ago), message_uuid FROM given
ON CONFLICT (process, handler, destination, kind) DO UPDATE
SET error_class = excluded.error_class, place = excluded.place, detail = excluded.detail, count = excluded.count,
    last_at = excluded.last_at, message_uuid = excluded.message_uuid, reported_at = now()"""

# Worker reports show the current state; receiver reports show the last hour.
_REPORTED: Final = f"""
SELECT p.kind AS problem, p.handler, p.destination, p.error_class, min(p.place) AS place, min(p.detail) AS detail,
       array_agg(DISTINCT p.host ORDER BY p.host) AS hosts, sum(p.count)::bigint AS count,
       min(p.first_at) AS first_at, max(p.last_at) AS last_at, min(m.kind) AS message_kind
FROM handler_problems p LEFT JOIN messages m ON m.uuid = p.message_uuid
WHERE p.reported_at > now() - interval '{_PROCESS_TIMEOUT}'
  AND (p.kind IN ('plugin_not_loaded', 'handler_not_started') OR p.last_at > now() - interval '{_RECENT}')
GROUP BY p.kind, p.handler, p.destination, p.error_class ORDER BY p.destination, p.handler, p.kind, p.error_class"""

_FAILING: Final = f"""
SELECT 'handler_failing' AS problem, d.handler, t.name AS destination, d.error_class, count(*) AS deliveries,
       sum(d.attempts - (d.started_at IS NOT NULL)::int)::bigint AS count, min(d.created_at) AS first_at,
       min(d.id) AS delivery, bool_or(d.deferred_since < now() - interval '{_DEFERRED}') AS deferred
FROM deliveries d JOIN destinations t ON t.id = d.destination_id
WHERE d.state = '{DeliveryState.PENDING}' AND d.error_class IS NOT NULL
GROUP BY d.handler, t.name, d.error_class
HAVING sum(d.attempts - (d.started_at IS NOT NULL)::int) >= {_MIN_FAILURES}
    OR bool_or(d.deferred_since < now() - interval '{_DEFERRED}')
ORDER BY t.name, d.handler, d.error_class"""
_FRAMES: Final = "SELECT error_frames FROM deliveries WHERE id = %(id)s"


def report(connection: Connection, process: str, host: str, problems: Sequence[HandlerProblem]) -> None:
    """Replace everything that the process reported before with `problems`."""
    connection.exec_driver_sql(
        _REPORT,
        {
            "process": process,
            "host": host,
            "kinds": [each.kind for each in problems],
            "handlers": [each.handler for each in problems],
            "destinations": [each.destination for each in problems],
            "classes": [each.error_class for each in problems],
            "places": [each.place for each in problems],
            "details": [each.detail for each in problems],
            "counts": [each.count for each in problems],
            "agos": [each.ago for each in problems],
            "messages": [each.message for each in problems],
        },
    )


def problems(connection: Connection) -> list[dict[str, Any]]:
    """Return all current problems of handlers, by destination and handler. Keys:

    problem: a kind of HandlerProblem, or `handler_failing` (its pending deliveries have failed twice or more, or it has
    raised RetryLater for long); handler, destination ("" as in HandlerProblem), error_class, place, detail, hosts,
    count (failures), first_at, last_at; message_kind of a query; deliveries (number) and delivery (the first one) that
    fail.
    """
    found = [dict(row) for row in connection.exec_driver_sql(_REPORTED).mappings()]
    for row in connection.exec_driver_sql(_FAILING).mappings().all():
        frames = connection.exec_driver_sql(_FRAMES, {"id": row["delivery"]}).scalar()
        found.append({**row, "place": _place(frames)})
    return [
        {
            "detail": None,
            "hosts": [],
            "last_at": None,
            "message_kind": None,
            "deliveries": 0,
            "delivery": None,
            "deferred": False,
            **each,
        }
        for each in found
    ]


def _place(frames: Sequence[str] | None) -> str | None:
    return frames[-1] if frames else None
