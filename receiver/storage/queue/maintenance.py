"""Maintenance by workers: heartbeats, the patient index, expired message keys, feed activity.

Must not run deliveries (see receiver.storage.queue.outcomes). Any number of workers may run maintenance at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Final

import msgspec
import structlog
from sqlalchemy import Connection

from receiver.errors import IntegrityError
from receiver.protocol.patients import identifiers
from receiver.storage.evidence.encryption import Sealer, payload_binding
from receiver.storage.evidence.macs import KeyedDigests

log: Final = structlog.get_logger(__name__)

# How far back the usual silence of a feed is computed.
ACTIVITY_HISTORY: Final = timedelta(days=14)
# A worker that was not seen for this long is gone. Its row is kept for a day, for operators to read.
_WORKER_TIMEOUT: Final = "30 seconds"
_RETENTION: Final = "1 day"
# How many messages are indexed in one transaction.
_MESSAGES: Final = 100
_BYTES: Final = 32 * 1024 * 1024
_KEYS: Final = 1_000

_SEEN: Final = f"""
WITH old AS (DELETE FROM workers WHERE seen_at < now() - interval '{_RETENTION}'),
me AS (INSERT INTO workers (name, host, pid, handlers, keys)
       VALUES (%(name)s, %(host)s, %(pid)s, %(handlers)s, %(keys)s)
       ON CONFLICT (name) DO UPDATE SET seen_at = now(), handlers = excluded.handlers, keys = excluded.keys)
SELECT count(*) FROM workers
WHERE name <> %(name)s AND seen_at > now() - interval '{_WORKER_TIMEOUT}' AND handlers && %(handlers)s::text[]"""

# An attempt that did not end may have killed its worker: the next one comes later, for that message alone. Messages
# that another worker has in hand are not chosen. The attempt need not survive a server crash, only this process.
_CLAIM: Final = f"""
WITH oldest AS (
    SELECT m.id, m.size, coalesce(t.attempts, 0) AS attempts FROM messages m
    LEFT JOIN patient_index_attempts t ON t.message_id = m.id
    WHERE m.patients_indexed_at IS NULL AND m.id <> ALL(%(without)s::bigint[])
      AND (t.message_id IS NULL OR t.attempted_at < now() - CASE t.attempts
           WHEN 1 THEN interval '1 minute' WHEN 2 THEN interval '1 hour' ELSE interval '1 day' END)
    ORDER BY m.id LIMIT {_MESSAGES} FOR UPDATE OF m SKIP LOCKED),
counted AS (SELECT *, sum(size) OVER (ORDER BY id) - size AS before, first_value(attempts) OVER (ORDER BY id) AS first
            FROM oldest),
claimed AS (
    INSERT INTO patient_index_attempts AS t (message_id)
    SELECT id FROM counted WHERE before < {_BYTES} AND CASE WHEN first > 0 THEN before = 0 ELSE attempts = 0 END
    ORDER BY id ON CONFLICT (message_id) DO UPDATE SET attempts = t.attempts + 1, attempted_at = now()
    RETURNING message_id)
SELECT message_id, set_config('synchronous_commit', 'off', true) FROM claimed"""
_UNINDEXED: Final = """
SELECT m.id, m.received_at, m.uuid, m.kind, m.source_id, p.payload_key, p.sealed
FROM messages m LEFT JOIN payloads p ON p.message_id = m.id AND p.received_at = m.received_at
WHERE m.id = ANY(%(ids)s::bigint[]) AND m.patients_indexed_at IS NULL ORDER BY m.id"""
_ENDED: Final = "DELETE FROM patient_index_attempts WHERE message_id = ANY(%(ids)s::bigint[])"
_DIGESTS: Final = """
INSERT INTO patient_digests (digest, message_id, received_at)
SELECT digest, message_id, received_at
FROM unnest(%(digests)s::bytea[], %(messages)s::bigint[], %(times)s::timestamptz[])
     AS u(digest, message_id, received_at)
ORDER BY digest, message_id ON CONFLICT DO NOTHING"""
_INDEXED: Final = """
UPDATE messages SET patients_indexed_at = now() WHERE id = ANY(%(ids)s::bigint[]) AND patients_indexed_at IS NULL"""

# A repeat may claim the key anew at this moment: locked rows are skipped.
_FORGET: Final = f"""
DELETE FROM message_keys k USING (
    SELECT destination_id, key, outside FROM message_keys WHERE expires_at < now()
    ORDER BY expires_at LIMIT {_KEYS} FOR UPDATE SKIP LOCKED) old
WHERE (k.destination_id, k.key, k.outside) = (old.destination_id, old.key, old.outside)"""

_BINDINGS: Final = """
SELECT t.name, s.handler FROM destinations t LEFT JOIN subscriptions s ON s.destination_id = t.id
WHERE t.environment = 'development'"""


def now(connection: Connection) -> datetime:
    """Return the time by the database's clock: a worker's own clock may be wrong."""
    found: datetime = connection.exec_driver_sql("SELECT now()").scalar_one()
    return found


def seen(connection: Connection, name: str, host: str, pid: int, handlers: Sequence[str], keys: Sequence[str]) -> int:
    """Record that this worker is alive, which handlers it has loaded, and the ids of the keys that it holds.

    Returns how many other live workers have loaded at least one of them.
    """
    return int(
        connection.exec_driver_sql(
            _SEEN, {"name": name, "host": host, "pid": pid, "handlers": list(handlers), "keys": list(keys)}
        ).scalar_one()
    )


def gone(connection: Connection, name: str) -> None:
    """Record that this worker ends in order."""
    connection.exec_driver_sql("DELETE FROM workers WHERE name = %(name)s", {"name": name})


def claim_unindexed(connection: Connection, *, without: Collection[int]) -> list[int]:
    """Claim some messages whose patients are not indexed. Index them after the COMMIT of this transaction. Returns ids.

    If indexing ends the process, they are claimed again one at a time: after a minute, an hour, then once a day.
    """
    return list(connection.exec_driver_sql(_CLAIM, {"without": list(without)}).scalars())


def index_patients(connection: Connection, seals: Sealer, digests: KeyedDigests, claimed: Sequence[int]) -> list[int]:
    """Write the keyed digests of the patients that these messages name, in the caller's transaction.

    Returns the ids of messages whose payload does not open with this host's keys. They stay unindexed for other hosts:
    pass them in `without` the next time. A message that cannot be read stays claimed.
    """
    rows = connection.exec_driver_sql(_UNINDEXED, {"ids": list(claimed)}).all()
    found: list[tuple[bytes, int, datetime]] = []
    done, closed = [], []
    for row in rows:
        try:
            if row.kind is not None and row.sealed is not None:  # readable, and not purged
                body = seals.open_body(row.payload_key, row.sealed, payload_binding(str(row.uuid)))
                found += [
                    (digests.patient(each.authority or row.source_id, each.type, each.value), row.id, row.received_at)
                    for each in identifiers(body)
                ]
        except IntegrityError:
            log.error("patients.payload_not_opened", id=row.id)
            closed.append(row.id)
            continue
        except msgspec.MsgspecError:
            log.error("patients.not_read", id=row.id)
            continue
        done.append(row.id)
    if found:
        names, messages, times = map(list, zip(*found, strict=True))
        connection.exec_driver_sql(_DIGESTS, {"digests": names, "messages": messages, "times": times})
    connection.exec_driver_sql(_INDEXED, {"ids": done})
    connection.exec_driver_sql(_ENDED, {"ids": done + closed})
    return closed


def forget_keys(connection: Connection) -> int:
    """Delete some expired message keys. Returns how many."""
    return connection.exec_driver_sql(_FORGET).rowcount


def forget_activity(connection: Connection) -> None:
    """Delete feed activity that is older than the history in use."""
    connection.exec_driver_sql(
        "DELETE FROM feed_activity WHERE slot < now() - %(history)s", {"history": 2 * ACTIVITY_HISTORY}
    )


def development_bindings(connection: Connection) -> dict[str, set[str]]:
    """Return each destination of environment development, with the handlers that were ever bound to it."""
    bound: dict[str, set[str]] = {}
    for destination, handler in connection.exec_driver_sql(_BINDINGS):
        bound.setdefault(destination, set()).update({handler} - {None})
    return bound
