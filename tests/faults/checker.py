"""Checks what must hold after every fault, from the database and the sender's attempt logs only.

Reads the tables by their documented names, opens the payloads with the keyring, and uses nothing that the receiver
reports about itself. It also reads the calls that handlers made to the external system. A violation is a sentence that
names ids, but nothing of a message's content.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, RowMapping, text

from receiver.errors import IntegrityError
from receiver.keyring import Keyring
from receiver.simulator.attempt_log import AttemptLog
from receiver.storage.evidence import verify
from receiver.storage.evidence.encryption import Sealer, payload_binding
from receiver.storage.evidence.macs import KeyedDigests

# Handlers that write a row into `effects` on context.connection.
EXACTLY_ONCE = frozenset({"book"})
# Handlers that call the external system with "done" when they have finished.
CALLING = frozenset({"outside", "anyhow", "shaky", "strict", "within"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """The input of the checks. `ledgers`: by destination. `journal`: the calls of tests.faults.effects, in order."""

    connection: Connection
    keyring: Keyring = field(repr=False)
    ledgers: Mapping[str, AttemptLog]
    journal: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """A stored message. `name`: its id in the sender's attempt log."""

    name: str
    id: int
    uuid: str
    destination: str
    digest: bytes
    state: str
    query: bool
    conflict: bool


def violations(evidence: Evidence) -> list[str]:
    """Return every invariant that does not hold. An empty list: nothing was lost, duplicated, reordered or forged."""
    rows = _rows(evidence)
    return [
        *_recorded(evidence, rows),
        *_nothing_else(evidence, rows),
        *unfinished(evidence.connection),
        *_undispatched(evidence.connection),
        *_overtaken(evidence),
        *_effects(evidence),
        *_verified(evidence),
    ]


# --- what was sent, and what is recorded

_MESSAGES = """
SELECT m.id, m.uuid::text, t.name AS destination, m.log_id, m.digest, m.state, m.query, m.id_conflict
FROM messages m JOIN destinations t ON t.id = m.destination_id ORDER BY m.id"""
_PAYLOADS = """
SELECT m.uuid::text, m.digest, m.size, p.payload_key, p.sealed
FROM messages m LEFT JOIN payloads p ON p.message_id = m.id ORDER BY m.id"""


def _sent(evidence: Evidence) -> dict[bytes, str]:
    """Return what was sent: the digest as it is stored → the SHA-256 in hexadecimal."""
    digests = KeyedDigests(evidence.keyring)
    return {
        digests.content_of(bytes.fromhex(attempt.sha256)): attempt.sha256
        for ledger in evidence.ledgers.values()
        for attempt in ledger.attempts
    }


def _name(row: RowMapping, sent: Mapping[bytes, str]) -> str:
    """Return the name under which the sender's ledger has a message."""
    return row["log_id"] or f"sha256:{sent.get(row['digest'], 'never sent')}"


def _rows(evidence: Evidence) -> list[_Row]:
    sent = _sent(evidence)
    return [
        _Row(
            name=_name(row, sent),
            id=row["id"],
            uuid=row["uuid"],
            destination=row["destination"],
            digest=row["digest"],
            state=row["state"],
            query=row["query"],
            conflict=row["id_conflict"],
        )
        for row in evidence.connection.execute(text(_MESSAGES)).mappings()
    ]


def _recorded(evidence: Evidence, rows: Sequence[_Row]) -> Iterator[str]:
    """Each message that was answered 200 is recorded once, with a digest that was sent, and its payload opens."""
    seals, digests = Sealer(evidence.keyring), KeyedDigests(evidence.keyring)
    found: defaultdict[tuple[str, str], list[_Row]] = defaultdict(list)
    for row in rows:
        found[row.destination, row.name].append(row)
    for destination, ledger in evidence.ledgers.items():
        for name in ledger.accepted():
            stored = found.get((destination, name), [])
            if not stored:
                yield f"{destination}: {name} was answered 200 and is not recorded"
            if len([row for row in stored if not (row.query or row.conflict)]) > 1:
                yield f"{destination}: {name} is recorded {len(stored)} times"
            # Each attempt has another attempt id, so the recorded bytes are those of one attempt.
            sent = {digests.content_of(bytes.fromhex(attempt.sha256)) for attempt in ledger.of(name)}
            for row in stored:
                if row.digest not in sent:
                    yield f"messages {row.id}: its digest was never sent"
    for payload in evidence.connection.execute(text(_PAYLOADS)).mappings():
        try:
            body = seals.open_body(payload["payload_key"], payload["sealed"], payload_binding(payload["uuid"]))
        except (IntegrityError, TypeError):
            yield f"messages {payload['uuid']}: its payload is missing, or does not open"
            continue
        if digests.content(body) != payload["digest"] or len(body) != payload["size"]:
            yield f"messages {payload['uuid']}: its payload is not what was received"


def _nothing_else(evidence: Evidence, rows: Sequence[_Row]) -> Iterator[str]:
    """Each recorded message was sent and not refused, unless it is in quarantine."""
    for row in rows:
        ledger = evidence.ledgers.get(row.destination)
        if ledger is None or row.state in ("quarantined", "discarded"):
            continue
        statuses = [attempt.status for attempt in ledger.of(row.name)]
        if not statuses:
            yield f"messages {row.id}: {row.name} was never sent"
        elif all(status is not None and 400 <= status < 500 for status in statuses):
            yield f"messages {row.id}: {row.name} was refused ({statuses}) and is recorded"


# --- deliveries

_UNFINISHED = """
SELECT d.id, d.lane, d.inline, d.message_id FROM deliveries d
LEFT JOIN lanes l USING (lane)
WHERE d.state = 'pending' AND NOT d.inline AND d.ready_at IS NULL
  AND coalesce(l.state, 'ready') NOT IN ('held', 'paused') AND NOT (coalesce(l.state, '') = 'waiting')
  AND EXISTS (SELECT FROM subscriptions s JOIN destinations t ON t.id = s.destination_id
              WHERE t.name = split_part(d.lane, '/', 2) AND s.handler = d.handler AND s.enabled
                AND s.paused_at IS NULL)
  AND EXISTS (SELECT FROM workers w WHERE d.handler = ANY (w.handlers) AND w.seen_at > now() - interval '1 minute')
ORDER BY d.id"""
_INLINE = "SELECT id, message_id FROM deliveries WHERE state = 'pending' AND inline ORDER BY id"
_UNDISPATCHED = """
SELECT m.id, m.state, count(d.id) AS deliveries FROM messages m LEFT JOIN deliveries d ON d.message_id = m.id
GROUP BY m.id, m.received_at HAVING (m.state = 'accepted' AND NOT m.query AND count(d.id) = 0)
                  OR (m.state IN ('quarantined', 'discarded', 'unhandled') AND count(d.id) > 0) ORDER BY m.id"""


def unfinished(connection: Connection) -> list[str]:
    """Return deliveries that are pending without a reason: no retry time, no held lane, and a worker for the handler.

    During the load there are some. After it, none may be left.
    """
    return [
        f"deliveries {row['id']}: pending in {row['lane']} without a reason"
        for row in connection.execute(text(_UNFINISHED)).mappings()
    ]


def _undispatched(connection: Connection) -> Iterator[str]:
    """Each accepted message has deliveries; quarantined, discarded and unhandled messages have none."""
    for row in connection.execute(text(_UNDISPATCHED)).mappings():
        yield f"messages {row['id']}: {row['state']}, with {row['deliveries']} deliveries"


# --- order

_ATTEMPTS = """
SELECT d.id, d.lane, d.handler, d.generation, d.inline, t.name AS destination, m.log_id, m.digest,
       a.attempt, a.outcome
FROM delivery_attempts a JOIN deliveries d ON d.id = a.delivery_id JOIN messages m ON m.id = d.message_id
JOIN destinations t ON t.id = d.destination_id ORDER BY a.id"""


def _overtaken(evidence: Evidence) -> Iterator[str]:
    """In each lane, a message that was answered before another was sent began and succeeded before it.

    Both the receiver's attempts and the calls to the external system must show this. Replays, and dead deliveries that
    were retried, are exempt: they run later.
    """
    attempts = [
        row
        for row in evidence.connection.execute(text(_ATTEMPTS)).mappings()
        if row["generation"] == 1 and "/any:" not in row["lane"]
    ]
    numbers: defaultdict[int, list[int]] = defaultdict(list)
    for row in attempts:
        numbers[row["id"]].append(row["attempt"])
    began: defaultdict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    succeeded: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    lanes: dict[tuple[str, str], str] = {}
    sent = _sent(evidence)
    for row in attempts:
        name = _name(row, sent)
        lanes[row["handler"], name] = row["lane"]
        began[row["destination"], row["lane"]].setdefault(name)
        again = len(set(numbers[row["id"]])) < len(numbers[row["id"]])
        if row["outcome"] == "succeeded" and not again:
            succeeded[row["destination"], row["lane"]].append(name)
    called: defaultdict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for line in evidence.journal:
        lane = lanes.get((line["handler"], line["message"]))
        if line["phase"] == "begin" and lane is not None and not line["replayed"]:
            called[line["destination"], lane].setdefault(line["message"])
    for what, each in (("began", began), ("succeeded", succeeded), ("reached the external system", called)):
        for (destination, lane), ran in each.items():
            ledger = evidence.ledgers.get(destination)
            for early, late in () if ledger is None else ledger.overtaken(list(ran)):
                yield f"{lane}: {early} {what} before {late}, but {late} was answered before {early} was sent"


# --- effects

_DELIVERIES = """
SELECT d.id, d.handler, d.state, d.generation, m.uuid::text, d.attempts FROM deliveries d
JOIN messages m ON m.id = d.message_id ORDER BY d.id"""


def _effects(evidence: Evidence) -> Iterator[str]:
    """Each success has exactly one row in our database, and at least one call to the external system for its key."""
    deliveries = {
        f"{row['uuid']}:{row['handler']}:{row['generation']}": row
        for row in evidence.connection.execute(text(_DELIVERIES)).mappings()
    }
    written = Counter(evidence.connection.execute(text("SELECT key FROM effects")).scalars())
    done = {line["key"] for line in evidence.journal if line["phase"] == "done"}
    for key, row in deliveries.items():
        succeeded = row["state"] == "succeeded"
        if row["handler"] in EXACTLY_ONCE and written[key] != succeeded:
            yield f"deliveries {row['id']} of {row['handler']}: {row['state']}, with {written[key]} rows in `effects`"
        if row["handler"] in CALLING and succeeded and key not in done:
            yield f"deliveries {row['id']} of {row['handler']}: succeeded without a call to the external system"
    queries = {f"{row.uuid}" for row in _rows(evidence) if row.query}
    for key in sorted({*written, *(line["key"] for line in evidence.journal)} - deliveries.keys()):
        if key.partition(":")[0] not in queries:
            yield f"effects of {key}, which has no delivery"


# --- audit log


def _verified(evidence: Evidence) -> Iterator[str]:
    """The audit chains, the MACs and the payloads verify, and each message has an audit row for its receipt."""
    found = verify.verify(evidence.connection, evidence.keyring, payloads=True)
    if found.first_bad is not None:
        yield found.first_bad
    for uuid in evidence.connection.execute(
        text(
            "SELECT uuid::text FROM messages m WHERE NOT EXISTS (SELECT FROM audit_events e WHERE "
            "e.message_uuid = m.uuid AND e.action = 'message.receive' AND e.outcome <> 'duplicate') ORDER BY id"
        )
    ).scalars():
        yield f"messages {uuid}: its receipt is not in the audit log"
