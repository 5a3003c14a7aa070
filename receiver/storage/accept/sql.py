"""SQL of the accept path: one statement records a batch, one records a single message; others handle duplicates.

Must not run them. The rows of a batch are sent as JSON, one document for each table: the statement's text is the same
for every batch, the server plans it once, and both sides process it in C. One array for each column cost three times as
much, and a plan each time. Only the sealed bodies are an array. A single message is sent as one parameter for each
column, which takes half the server's CPU time. A statement that psycopg's cursor runs has at most 4,096 characters: it
parses a longer one each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from receiver.states import DeliveryState, MessageState
from receiver.storage.accept.prepared import Parameters, Statement, array, encoder

# Column → type. `id` is null where the row has no identity yet.
_MESSAGE: Final = {
    "id": "bigint",
    "uuid": "uuid",
    "destination_id": "bigint",
    "credential_ids": "bigint[]",
    "source_id": "text",
    "kind": "text",
    "query": "boolean",
    "test": "boolean",
    "log_id": "text",
    "attempt_id": "text",
    "message_id": "text",
    "transmission_id": "text",
    "facility": "text",
    "event_time": "timestamptz",
    "received_at": "timestamptz",
    "peer": "text",
    "digest": "bytea",
    "size": "integer",
    "content_type": "text",
    "state": "text",
    "quarantine_reason": "text",
    "id_conflict": "boolean",
    "mac": "bytea",
    "mac_key": "text",
    "key": "bytea",
    "outside": "bytea",
    "key_expires_at": "timestamptz",
    "payload_key": "text",
}
_DELIVERY: Final = {
    "d_uuid": "uuid",
    "d_destination_id": "bigint",
    "d_handler": "text",
    "d_lane": "text",
    "d_inline": "boolean",
}
_AUDIT: Final = {
    "writer": "uuid",
    "n": "bigint",
    "at": "timestamptz",
    "action": "text",
    "outcome": "text",
    "reason": "text",
    "actor": "text",
    "peer": "text",
    "destination": "text",
    "message_uuid": "uuid",
    "subject": "text",
    "count": "integer",
    "detail": "text",
    "note": "bytea",
    "note_key": "text",
    "mac": "bytea",
    "mac_key": "text",
    "follows": "bigint",
}
_KEYS: Final = ("destination_id", "key", "outside", "received_at", "key_expires_at")
# The host computes the expiry with its own clock. The same duration is added to the database's clock.
_EXPIRES: Final = "now() + (key_expires_at - received_at)"
_encode: Final = msgspec.json.Encoder().encode


def _rows(document: str, columns: Mapping[str, str], *, sealed: str | None = None) -> str:
    """Return the FROM item `r`: the rows of a JSON document, numbered by `place`. `sealed`: the array of sealed bodies.

    Bytes are base64 in a document.
    """
    typed = ", ".join(f"{name} {'text' if kind == 'bytea' else kind}" for name, kind in columns.items())
    found = ", ".join(
        f"decode({name}, 'base64') AS {name}" if kind == "bytea" else name for name, kind in columns.items()
    )
    document = f"json_to_recordset({document}::json) AS ({typed})"
    if sealed is not None:
        document, found = f"{document}, unnest({sealed})", f"{found}, unnest AS sealed"
    return f"(SELECT {found}, ordinality AS place FROM ROWS FROM ({document}) WITH ORDINALITY AS j) r"


_STORED: Final = [
    name for name in _MESSAGE if name not in ("id", "key", "outside", "key_expires_at", "payload_key", "id_conflict")
]


def _record(*, with_keys: bool, alone: bool) -> Statement:
    """Return the statement that writes a batch: messages, payloads, deliveries, audit rows, and keys unless claimed
    before.

    If a key exists already the statement fails (23505), and the batch takes the duplicate path. Identity numbers are
    given in the order of arrival, because a lane runs deliveries in the order of their ids. `fold` flags a conflict
    within the batch, because this statement would flag the first of the two as well.

    With `alone` the body is not put into an array: it may have 40 MB. Returns each message's id and the ids of its
    inline deliveries, in the order of the messages.
    """
    sealed = "ARRAY[$2::bytea]" if alone else "$2::bytea[]"
    keys = (
        f"""
k AS (INSERT INTO message_keys (destination_id, key, outside, message_id, received_at, expires_at)
      SELECT destination_id, key, outside, number, received_at, {_EXPIRES} FROM i WHERE key IS NOT NULL
      ORDER BY destination_id, key, outside),"""
        if with_keys
        else ""
    )
    stored = ", ".join(_STORED)
    name = f"record_{'with_keys' if with_keys else 'claimed'}_{'one' if alone else 'many'}"
    return Statement(
        name,
        f"""
WITH i AS MATERIALIZED (
      SELECT r.*, coalesce(r.id, nextval('messages_id_seq')) AS number
      FROM {_rows("$1", _MESSAGE, sealed=sealed)} ORDER BY place),
m AS (INSERT INTO messages (id, id_conflict, {stored}) OVERRIDING SYSTEM VALUE
      SELECT number, id_conflict OR EXISTS (
                 SELECT FROM message_keys o WHERE o.destination_id = i.destination_id AND o.key = i.key
                 AND o.outside <> i.outside AND o.message_id NOT IN (SELECT number FROM i)),
             {stored} FROM i ORDER BY place),{keys}
p AS (INSERT INTO payloads (message_id, received_at, payload_key, sealed)
      SELECT number, received_at, payload_key, sealed FROM i),
d AS (INSERT INTO deliveries (message_id, received_at, destination_id, handler, lane, inline)
      SELECT number, received_at, d_destination_id, d_handler, d_lane, d_inline
      FROM {_rows("$3", _DELIVERY)} JOIN i ON i.uuid = d_uuid ORDER BY r.place
      RETURNING id, message_id, inline),
a AS ({_audit_insert("$4")})
SELECT number, ARRAY(SELECT d.id FROM d WHERE d.message_id = number AND d.inline) FROM i ORDER BY place""",
    )


def _audit_insert(document: str) -> str:
    names = ", ".join(_AUDIT)
    return f"INSERT INTO audit_events ({names}) SELECT {names} FROM {_rows(document, _AUDIT)} ORDER BY place"


# By (with_keys, alone).
RECORD: Final = {
    (with_keys, alone): _record(with_keys=with_keys, alone=alone)
    for with_keys in (True, False)
    for alone in (True, False)
}
AUDIT: Final = Statement("audit", _audit_insert("$1"))

# The columns of a message and its audit row when it is recorded alone. Its id is always a new one.
_ALONE: Final = {name: kind for name, kind in _MESSAGE.items() if name not in ("id", "id_conflict")}
_encode_alone: Final = encoder(_ALONE)
_encode_audit: Final = encoder(_AUDIT)


def _record_alone() -> Statement:
    """Return the statement that writes one message with its key, payload and deliveries, and one audit row.

    It fails when the key exists already (23505). Its result has the same form as a batch's.
    """
    at = {name: f"${number}::{_ALONE.get(name, 'bytea')}" for number, name in enumerate([*_ALONE, "sealed"], 1)}
    documents = len(at) + 1
    audit = ", ".join(f"${number}::{kind}" for number, kind in enumerate(_AUDIT.values(), documents + 1))
    return Statement(
        "record_alone",
        f"""
WITH m AS (INSERT INTO messages (id_conflict, {", ".join(_STORED)})
      SELECT EXISTS (SELECT FROM message_keys WHERE destination_id = {at["destination_id"]} AND key = {at["key"]}
                     AND outside <> {at["outside"]}),
             {", ".join(at[name] for name in _STORED)}
      RETURNING id),
k AS (INSERT INTO message_keys (destination_id, key, outside, message_id, received_at, expires_at)
      SELECT {at["destination_id"]}, {at["key"]}, {at["outside"]}, id, {at["received_at"]},
             now() + ({at["key_expires_at"]} - {at["received_at"]})
      FROM m WHERE {at["key"]} IS NOT NULL),
p AS (INSERT INTO payloads (message_id, received_at, payload_key, sealed)
      SELECT id, {at["received_at"]}, {at["payload_key"]}, {at["sealed"]} FROM m),
d AS (INSERT INTO deliveries (message_id, received_at, destination_id, handler, lane, inline)
      SELECT m.id, {at["received_at"]}, d_destination_id, d_handler, d_lane, d_inline
      FROM {_rows(f"${documents}", _DELIVERY)} CROSS JOIN m ORDER BY r.place
      RETURNING id, inline),
a AS (INSERT INTO audit_events ({", ".join(_AUDIT)}) SELECT {audit})
SELECT id, ARRAY(SELECT d.id FROM d WHERE d.inline) FROM m""",
    )


RECORD_ALONE: Final = _record_alone()

# The duplicate path is a transaction, READ COMMITTED whatever the server's default: with one snapshot for all of it, a
# duplicate that was just committed would be invisible.
BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"

# First step: claim the keys. Sorted, because two batches that claim them in opposite orders would deadlock. An expired
# key is claimed anew. Keys that are not returned belong to other messages.
CLAIM_KEYS: Final = f"""
WITH i AS MATERIALIZED (
      SELECT r.*, nextval('messages_id_seq') AS id
      FROM {_rows("%(keys)s", {name: _MESSAGE[name] for name in _KEYS})} ORDER BY place)
INSERT INTO message_keys AS k (destination_id, key, outside, message_id, received_at, expires_at)
SELECT destination_id, key, outside, id, received_at, {_EXPIRES} FROM i ORDER BY destination_id, key, outside
ON CONFLICT (destination_id, key, outside)
DO UPDATE SET message_id = excluded.message_id, received_at = excluded.received_at, expires_at = excluded.expires_at
WHERE k.expires_at < now()
RETURNING destination_id, key, outside, message_id"""

# Second step, a separate statement: the snapshot of the first does not include a concurrent duplicate.
EXISTING: Final = f"""
SELECT k.destination_id, k.key, k.outside, m.id, m.received_at, m.uuid, m.state
FROM {_rows("%(keys)s", {name: _MESSAGE[name] for name in _KEYS})}
JOIN message_keys k USING (destination_id, key, outside)
JOIN messages m ON m.id = k.message_id AND m.received_at = k.received_at"""

# What a repeat takes up again. This excludes messages without metadata (unreadable, or refused by the database), which
# `messages release` fills in, and what an operator has discarded.
REVIVE_DEAD: Final = f"""
UPDATE deliveries
SET state = '{DeliveryState.PENDING}', attempts = 0, ready_at = NULL, deferred_since = NULL, finished_at = NULL
WHERE message_id = %(message_id)s AND received_at = %(received_at)s AND state = '{DeliveryState.DEAD}'
RETURNING lane"""
TAKE_UP: Final = f"""
UPDATE messages SET state = %(state)s, quarantine_reason = NULL
WHERE id = %(message_id)s AND received_at = %(received_at)s
  AND state IN ('{MessageState.UNHANDLED}', '{MessageState.QUARANTINED}')
  AND kind IS NOT NULL"""
ADD_DELIVERIES: Final = f"""
INSERT INTO deliveries (message_id, received_at, destination_id, handler, lane, inline)
SELECT %(message_id)s, %(received_at)s, d_destination_id, d_handler, d_lane, d_inline
FROM {_rows("%(deliveries)s", _DELIVERY)}
ORDER BY place ON CONFLICT (message_id, handler, generation, received_at) DO NOTHING RETURNING lane"""
INLINE_PENDING: Final = f"""
SELECT id FROM deliveries
WHERE message_id = %(message_id)s AND received_at = %(received_at)s AND inline
  AND state = '{DeliveryState.PENDING}' ORDER BY id"""

# The least size that counts for a body in quarantine: its rows take that much.
MIN_QUARANTINED_SIZE: Final = 2048
QUARANTINED_BYTES: Final = f"""
SELECT coalesce(sum(greatest(size, {MIN_QUARANTINED_SIZE})), 0)::bigint FROM messages
WHERE destination_id = %(destination_id)s AND state = '{MessageState.QUARANTINED}'"""
LAST_USED: Final = """
WITH u AS (SELECT * FROM unnest(%(id)s::bigint[], %(at)s::timestamptz[]) AS u(id, at)),
activity AS (
    INSERT INTO feed_activity (destination_id, slot)
    SELECT DISTINCT c.destination_id, date_bin('5 minutes', u.at, '2000-01-01 00:00:00Z') AS slot
    FROM u JOIN credentials c ON c.id = u.id ORDER BY 1, 2 ON CONFLICT DO NOTHING)
UPDATE credentials SET last_used_at = u.at FROM u
WHERE credentials.id = u.id AND (last_used_at IS NULL OR last_used_at < u.at)"""


def keys(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the parameters of CLAIM_KEYS and EXISTING: the keys of the messages."""
    return {"keys": _encode([{name: row[name] for name in _KEYS} for row in rows]).decode()}


def deliveries(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the deliveries of the parameters of ADD_DELIVERIES."""
    return {"deliveries": _encode(rows).decode()}


def batch(
    messages: Sequence[Mapping[str, Any]],
    sealed: Sequence[bytes],
    new: Sequence[Mapping[str, Any]],
    audit: Sequence[Mapping[str, Any]],
) -> Parameters:
    """Return the parameters of RECORD: the messages, their sealed bodies, their deliveries, and the audit rows."""
    return (_encode(messages), sealed[0] if len(sealed) == 1 else array("bytea", sealed), _encode(new), _encode(audit))


def audit_rows(rows: Sequence[Mapping[str, Any]]) -> Parameters:
    """Return the parameters of AUDIT."""
    return (_encode(rows),)


def alone(
    message: Mapping[str, Any], sealed: bytes, new: Sequence[Mapping[str, Any]], audit: Mapping[str, Any]
) -> Parameters:
    """Return the parameters of RECORD_ALONE. Raises UnicodeEncodeError or struct.error for a bad value."""
    return [*_encode_alone(message), sealed, _encode(new), *_encode_audit(audit)]
