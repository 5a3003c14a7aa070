"""Queries for a review of the audit log: what people did and saw, and whose authentic requests were refused."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection

from receiver.storage.evidence.audit_log import AUTHENTIC_REASONS
from receiver.storage.operations.queries.rows import Mappings, mappings_of

# What is reviewed, in the order of reading: a name, and the condition on audit rows.
SUBJECTS: Final = {
    "disclosure": "action LIKE '%%.disclose' OR action IN ('audit.export', 'audit.report')",
    "refusal": "action IN ('message.refuse', 'token.refuse') AND (actor = 'redox' OR reason = ANY(%(authentic)s))",
    "key": "action LIKE 'key.%%' OR action LIKE 'signing_key.%%' OR action LIKE 'api_key.%%'",
    "registry": "action LIKE 'credential.%%' OR action LIKE 'source.%%' OR action LIKE 'handler.%%'"
    " OR action LIKE 'key_set.%%' OR action IN ('destination.add', 'destination.set')",
    "correction": "action IN ('delivery.retry', 'delivery.skip', 'lane.release', 'message.discard',"
    " 'message.release', 'message.replay', 'outbound.retry')",
}
_CASES: Final = " ".join(f"WHEN {condition} THEN '{name}'" for name, condition in SUBJECTS.items())

_LAST: Final = """
SELECT id, at, actor, (detail::jsonb ->> 'last')::bigint AS last FROM audit_events
WHERE action = 'audit.review' ORDER BY id DESC LIMIT 1"""
_NEWEST: Final = "SELECT coalesce(max(id), 0) AS newest FROM audit_events"
_REVIEW: Final = f"""
WITH rows AS (
    SELECT *, CASE {_CASES} END AS subject_kind FROM audit_events WHERE id > %(after)s AND id <= %(last)s)
SELECT subject_kind AS about, action, outcome, reason, actor, destination, sum(count)::bigint AS count,
       min(at) AS first_at, max(at) AS last_at, min(id) AS first_id, max(id) AS last_id
FROM rows WHERE subject_kind IS NOT NULL
GROUP BY subject_kind, action, outcome, reason, actor, destination
ORDER BY array_position(%(order)s::text[], subject_kind), max(id) DESC"""


def last_review(connection: Connection) -> dict[str, object] | None:
    """Return the last recorded review: id, at, actor, last (the id of the newest row it covered); None before any."""
    found = mappings_of(connection, _LAST, {})
    return found[0] if found else None


def newest_audit_row(connection: Connection) -> int:
    """Return the id of the newest audit row; 0 when there is none."""
    return int(mappings_of(connection, _NEWEST, {})[0]["newest"])


def review(connection: Connection, *, after: int, last: int) -> Mappings:
    """Return what is to be reviewed among the audit rows after id `after`, up to `last`, summed up.

    Keys: about (a key of SUBJECTS), action, outcome, reason, actor, destination, count, first_at, last_at, first_id,
    last_id. Refusals are those of authentic senders: the request came from a holder of a credential.
    """
    return mappings_of(
        connection,
        _REVIEW,
        {"after": after, "last": last, "authentic": list(AUTHENTIC_REASONS), "order": list(SUBJECTS)},
    )
