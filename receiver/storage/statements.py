"""The statements of the accept path: one that records a whole batch, and what duplicates need besides.

May not run them. Arrays go in, one element a row, so that a statement's text is the same for every batch and the server
plans it once. `%b` sends the sealed bodies as they are, without a detour through hexadecimal text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from receiver.storage.entry import UNSTORABLE

# Column → type, in the order of the arrays. `id` is null where the row's identity is still to be given.
_MESSAGE: Final = {
    "id": "bigint", "uuid": "uuid", "destination_id": "bigint", "credential_ids": "text", "source_id": "text",
    "kind": "text", "query": "boolean", "test": "boolean", "log_id": "text", "attempt_id": "text", "message_id": "text",
    "transmission_id": "text", "facility": "text", "event_time": "timestamptz", "received_at": "timestamptz",
    "peer": "text", "sha256": "bytea", "size": "integer", "content_type": "text", "state": "text",
    "quarantine_reason": "text", "id_conflict": "boolean", "mac": "bytea", "mac_key": "text",
    "key": "bytea", "outside": "bytea", "key_expires_at": "timestamptz", "payload_key": "text", "sealed": "bytea"}
_DELIVERY: Final = {"d_uuid": "uuid", "d_destination_id": "bigint", "d_handler": "text", "d_lane": "text",
                    "d_inline": "boolean"}
_AUDIT: Final = {
    "writer": "uuid", "n": "bigint", "at": "timestamptz", "action": "text", "outcome": "text", "reason": "text",
    "actor": "text", "peer": "text", "destination": "text", "message_uuid": "uuid", "subject": "text",
    "count": "integer", "detail": "text", "note": "bytea", "note_key": "text", "mac": "bytea", "mac_key": "text"}
_KEYS: Final = ("destination_id", "key", "outside", "key_expires_at")
_BINARY: Final = frozenset({"sealed"})


def _rows(columns: Mapping[str, str], alias: str, prefix: str = "") -> str:
    """`unnest(…) WITH ORDINALITY AS alias(columns, place)`."""
    arrays = (f"%({prefix}{name}){'b' if name in _BINARY else 's'}::{kind}[]" for name, kind in columns.items())
    return f"unnest({', '.join(arrays)}) WITH ORDINALITY AS {alias}({', '.join(columns)}, place)"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


_STORED: Final = [name for name in _MESSAGE if name not in
                  ("id", "credential_ids", "key", "outside", "key_expires_at", "payload_key", "sealed", "id_conflict")]


def _record(*, with_keys: bool) -> str:
    """One statement that writes a batch: messages, payloads, deliveries, audit, and the keys where nobody did before.

    A key that is there already fails the whole (23505), and the batch goes the longer way. Identity numbers are given
    in the order of arrival, for the order of deliveries in a lane is that of their ids. A conflict within the batch is
    flagged by who folded it, and not here: that would flag the first of the two as well.
    """
    keys = """
k AS (INSERT INTO message_keys (destination_id, key, outside, message_id, expires_at)
      SELECT destination_id, key, outside, id, key_expires_at FROM i WHERE key IS NOT NULL
      ORDER BY destination_id, key, outside),""" if with_keys else ""
    return f"""
WITH i AS MATERIALIZED (
      SELECT coalesce(r.id, nextval('messages_id_seq')) AS id,
             {", ".join(f"r.{name}" for name in _MESSAGE if name != "id")}, r.place
      FROM {_rows(_MESSAGE, "r")} ORDER BY r.place),
m AS (INSERT INTO messages (id, credential_ids, id_conflict, {_quoted(_STORED)}) OVERRIDING SYSTEM VALUE
      SELECT id, credential_ids::bigint[],
             id_conflict OR EXISTS (
                 SELECT FROM message_keys o WHERE o.destination_id = i.destination_id AND o.key = i.key
                 AND o.outside <> i.outside AND o.message_id NOT IN (SELECT id FROM i)),
             {_quoted(_STORED)} FROM i ORDER BY place),{keys}
p AS (INSERT INTO payloads (message_id, received_at, payload_key, sealed)
      SELECT id, received_at, payload_key, sealed FROM i),
d AS (INSERT INTO deliveries (message_id, destination_id, handler, lane, inline)
      SELECT i.id, d_destination_id, d_handler, d_lane, d_inline
      FROM {_rows(_DELIVERY, "d")} JOIN i ON i.uuid = d_uuid ORDER BY d.place RETURNING id, message_id, inline),
a AS ({_audit_insert()})
SELECT i.uuid, i.id, ARRAY(SELECT d.id FROM d WHERE d.message_id = i.id AND d.inline) AS inline FROM i"""


def _audit_insert() -> str:
    return (f"INSERT INTO audit_events ({_quoted(list(_AUDIT))}) SELECT {_quoted(list(_AUDIT))} "
            f"FROM {_rows(_AUDIT, 'e', 'a_')} ORDER BY place")


RECORD: Final = _record(with_keys=True)
RECORD_WITHOUT_KEYS: Final = _record(with_keys=False)
AUDIT: Final = _audit_insert()

# The longer way is a transaction. Whatever the server's default: with one snapshot for all of it, what a concurrent
# duplicate has just committed would stay out of sight.
BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"

# First step: claim the keys. Sorted, for two batches that take them in opposite orders would deadlock.
# A key that has expired is claimed anew. What is not returned is somebody else's.
CLAIM_KEYS: Final = f"""
WITH i AS MATERIALIZED (
      SELECT r.*, nextval('messages_id_seq') AS id
      FROM {_rows({name: _MESSAGE[name] for name in _KEYS}, "r")} ORDER BY place)
INSERT INTO message_keys AS k (destination_id, key, outside, message_id, expires_at)
SELECT destination_id, key, outside, id, key_expires_at FROM i ORDER BY destination_id, key, outside
ON CONFLICT (destination_id, key, outside)
DO UPDATE SET message_id = excluded.message_id, expires_at = excluded.expires_at WHERE k.expires_at < now()
RETURNING destination_id, key, outside, message_id"""

# Second step, a statement of its own: in the first one's snapshot a concurrent duplicate would see neither row.
EXISTING: Final = f"""
SELECT k.destination_id, k.key, k.outside, m.id, m.uuid, m.state
FROM {_rows({name: _MESSAGE[name] for name in _KEYS}, "r")}
JOIN message_keys k USING (destination_id, key, outside) JOIN messages m ON m.id = k.message_id"""

# What a repeat takes up again. Not what is in quarantine because its columns cannot be stored, nor what an operator has
# discarded.
REVIVE_DEAD: Final = """
UPDATE deliveries SET state = 'pending', attempts = 0, ready_at = NULL, deferred_since = NULL, finished_at = NULL
WHERE message_id = %(message_id)s AND state = 'dead' RETURNING lane"""
TAKE_UP: Final = f"""
UPDATE messages SET state = %(state)s, quarantine_reason = NULL
WHERE id = %(message_id)s AND state IN ('unhandled', 'quarantined')
  AND quarantine_reason IS DISTINCT FROM '{UNSTORABLE}'"""
ADD_DELIVERIES: Final = f"""
INSERT INTO deliveries (message_id, destination_id, handler, lane, inline)
SELECT %(message_id)s, d_destination_id, d_handler, d_lane, d_inline FROM {_rows(_DELIVERY, "d")} ORDER BY d.place
ON CONFLICT (message_id, handler, generation) DO NOTHING RETURNING lane"""
INLINE_PENDING: Final = """
SELECT id FROM deliveries WHERE message_id = %(message_id)s AND inline AND state = 'pending' ORDER BY id"""

QUARANTINED_BYTES: Final = """
SELECT coalesce(sum(size), 0)::bigint FROM messages
WHERE destination_id = %(destination_id)s AND state = 'quarantined'"""
LAST_USED: Final = """
UPDATE credentials SET last_used_at = u.at FROM unnest(%(id)s::bigint[], %(at)s::timestamptz[]) AS u(id, at)
WHERE credentials.id = u.id AND (last_used_at IS NULL OR last_used_at < u.at)"""


def message_arrays(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows as one array a column."""
    arrays = {name: [row[name] for row in rows] for name in _MESSAGE}
    # Arrays of several lengths make no array: each goes as the text of one.
    arrays["credential_ids"] = [f"{{{','.join(map(str, ids))}}}" for ids in arrays["credential_ids"]]
    return arrays


def key_arrays(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The key columns of the rows."""
    return {name: [row[name] for row in rows] for name in _KEYS}


def delivery_arrays(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The deliveries as one array a column."""
    return {name: [row[name] for row in rows] for name in _DELIVERY}


def audit_arrays(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The audit rows as one array a column."""
    return {f"a_{name}": [row[name] for row in rows] for name in _AUDIT}
