"""What must hold after every fault, found out from the database and the sender's own ledgers alone.

Reads the tables by their published names, opens the payloads with the keyring, and believes nothing that the receiver
says of itself. Beside it stands what the handlers' other system was told. A violation is a sentence that names ids;
nothing of a message's content.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, text

from receiver.errors import IntegrityError
from receiver.keyring import Keyring
from receiver.simulator.attempt_log import AttemptLog
from receiver.storage.evidence import verify
from receiver.storage.evidence.encryption import Sealer, payload_binding

# Handlers that write a row into `effects` on context.connection.
EXACTLY_ONCE = frozenset({"book"})
# Handlers that tell the other system "done" when they have done it.
TELLING = frozenset({"outside", "anyhow", "shaky", "strict", "within"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What is judged. `ledgers`: by the destination's name; `journal`: tests.faults.effects.tell, in order."""

    connection: Connection
    keyring: Keyring = field(repr=False)
    ledgers: Mapping[str, AttemptLog]
    journal: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """A message as it is stored, under its name in the sender's ledger."""

    name: str
    id: int
    uuid: str
    destination: str
    digest: bytes
    state: str
    query: bool
    conflict: bool


def violations(evidence: Evidence) -> list[str]:
    """Every invariant that does not hold; none: nothing was lost, doubled, overtaken, forged or let in."""
    rows = _rows(evidence.connection)
    return [
        *_recorded(evidence, rows),
        *_nothing_else(evidence, rows),
        *unfinished(evidence.connection),
        *_undispatched(evidence.connection),
        *_overtaken(evidence),
        *_effects(evidence),
        *_proved(evidence),
    ]


# --- what was sent, and what is there

_MESSAGES = """
SELECT m.id, m.uuid::text, t.name AS destination, m.log_id, m.sha256, m.state, m.query, m.id_conflict
FROM messages m JOIN destinations t ON t.id = m.destination_id ORDER BY m.id"""
_PAYLOADS = """
SELECT m.uuid::text, m.sha256, m.size, p.payload_key, p.sealed
FROM messages m LEFT JOIN payloads p ON p.message_id = m.id ORDER BY m.id"""


def _rows(connection: Connection) -> list[_Row]:
    return [
        _Row(
            name=row["log_id"] or f"sha256:{row['sha256'].hex()}",
            id=row["id"],
            uuid=row["uuid"],
            destination=row["destination"],
            digest=row["sha256"],
            state=row["state"],
            query=row["query"],
            conflict=row["id_conflict"],
        )
        for row in connection.execute(text(_MESSAGES)).mappings()
    ]


def _recorded(evidence: Evidence, rows: Sequence[_Row]) -> Iterator[str]:
    """Every 200 is in the database, once, with a digest that was sent, and its bytes are there."""
    found: defaultdict[tuple[str, str], list[_Row]] = defaultdict(list)
    for row in rows:
        found[row.destination, row.name].append(row)
    for destination, ledger in evidence.ledgers.items():
        for name in ledger.accepted():
            these = found.get((destination, name), [])
            if not these:
                yield f"{destination}: {name} was answered 200 and is not there"
            if len([row for row in these if not (row.query or row.conflict)]) > 1:
                yield f"{destination}: {name} is there {len(these)} times"
            # A repeat has another attempt id, so the bytes kept are those of one of its sendings.
            sent = {attempt.sha256 for attempt in ledger.of(name)}
            for row in these:
                if row.digest.hex() not in sent:
                    yield f"messages {row.id}: its digest was never sent"
    seals = Sealer(evidence.keyring)
    for payload in evidence.connection.execute(text(_PAYLOADS)).mappings():
        try:
            body = seals.open_body(payload["payload_key"], payload["sealed"], payload_binding(payload["uuid"]))
        except (IntegrityError, TypeError):
            yield f"messages {payload['uuid']}: its payload is gone, or does not open"
            continue
        if sha256(body).digest() != payload["sha256"] or len(body) != payload["size"]:
            yield f"messages {payload['uuid']}: its payload is not what came"


def _nothing_else(evidence: Evidence, rows: Sequence[_Row]) -> Iterator[str]:
    """What is there was sent, and not refused; what the sender's ledger does not know is in quarantine at most."""
    for row in rows:
        ledger = evidence.ledgers.get(row.destination)
        if ledger is None or row.state in ("quarantined", "discarded"):
            continue
        statuses = [attempt.status for attempt in ledger.of(row.name)]
        if not statuses:
            yield f"messages {row.id}: {row.name} was never sent"
        elif all(status is not None and 400 <= status < 500 for status in statuses):
            yield f"messages {row.id}: {row.name} was refused ({statuses}) and is there"


# --- what became of it

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
GROUP BY m.id HAVING (m.state = 'accepted' AND NOT m.query AND count(d.id) = 0)
                  OR (m.state IN ('quarantined', 'discarded', 'unhandled') AND count(d.id) > 0) ORDER BY m.id"""


def unfinished(connection: Connection) -> list[str]:
    """What is pending without a reason: no time that it waits for, nothing that holds it, and a worker that has it.

    For a while that is how work looks; when nothing is sent and nothing fails any more, none may be left.
    """
    return [
        f"deliveries {row['id']}: pending in {row['lane']}, and nothing is in its way"
        for row in connection.execute(text(_UNFINISHED)).mappings()
    ]


def _undispatched(connection: Connection) -> Iterator[str]:
    """What is accepted was handed over, what is kept apart was not."""
    for row in connection.execute(text(_UNDISPATCHED)).mappings():
        yield f"messages {row['id']}: {row['state']}, with {row['deliveries']} deliveries"


# --- in which order

_ATTEMPTS = """
SELECT d.id, d.lane, d.handler, d.generation, d.inline, t.name AS destination, m.log_id, m.sha256,
       a.attempt, a.outcome
FROM delivery_attempts a JOIN deliveries d ON d.id = a.delivery_id JOIN messages m ON m.id = d.message_id
JOIN destinations t ON t.id = d.destination_id ORDER BY a.id"""


def _overtaken(evidence: Evidence) -> Iterator[str]:
    """In each lane, what was answered before another was sent began before it, and succeeded before it.

    Told by the receiver's own attempts, and by the other system. A replay has left its place; what was dead and was
    run again has not ended in its place.
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
    for row in attempts:
        name = row["log_id"] or f"sha256:{row['sha256'].hex()}"
        lanes[row["handler"], name] = row["lane"]
        began[row["destination"], row["lane"]].setdefault(name)
        again = len(set(numbers[row["id"]])) < len(numbers[row["id"]])
        if row["outcome"] == "succeeded" and not again:
            succeeded[row["destination"], row["lane"]].append(name)
    told: defaultdict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for line in evidence.journal:
        lane = lanes.get((line["handler"], line["message"]))
        if line["phase"] == "begin" and lane is not None and not line["replayed"]:
            told[line["destination"], lane].setdefault(line["message"])
    for what, each in (("began", began), ("succeeded", succeeded), ("reached the other system", told)):
        for (destination, lane), ran in each.items():
            ledger = evidence.ledgers.get(destination)
            for early, late in () if ledger is None else ledger.overtaken(list(ran)):
                yield f"{lane}: {early} {what} before {late}, which was answered before it was sent"


# --- with which effects

_DELIVERIES = """
SELECT d.id, d.handler, d.state, d.generation, m.uuid::text, d.attempts FROM deliveries d
JOIN messages m ON m.id = d.message_id ORDER BY d.id"""


def _effects(evidence: Evidence) -> Iterator[str]:
    """Work on our connection exactly once for each success and not at all without; elsewhere once for each key."""
    deliveries = {
        f"{row['uuid']}:{row['handler']}:{row['generation']}": row
        for row in evidence.connection.execute(text(_DELIVERIES)).mappings()
    }
    written = Counter(evidence.connection.execute(text("SELECT key FROM effects")).scalars())
    done = {line["key"] for line in evidence.journal if line["phase"] == "done"}
    for key, row in deliveries.items():
        succeeded = row["state"] == "succeeded"
        if row["handler"] in EXACTLY_ONCE and written[key] != succeeded:
            yield f"deliveries {row['id']} of {row['handler']}: {row['state']}, with {written[key]} rows of its work"
        if row["handler"] in TELLING and succeeded and key not in done:
            yield f"deliveries {row['id']} of {row['handler']}: succeeded, and the other system was never told"
    queries = {f"{row.uuid}" for row in _rows(evidence.connection) if row.query}
    for key in sorted({*written, *(line["key"] for line in evidence.journal)} - deliveries.keys()):
        if key.partition(":")[0] not in queries:
            yield f"effects of {key}, which was never delivered"


# --- and with which evidence


def _proved(evidence: Evidence) -> Iterator[str]:
    """The audit's chains, the MACs and the payloads hold, and every message says in the audit how it came."""
    found = verify.verify(evidence.connection, evidence.keyring, payloads=True)
    if found.first_bad is not None:
        yield found.first_bad
    for uuid in evidence.connection.execute(
        text(
            "SELECT uuid::text FROM messages m WHERE NOT EXISTS (SELECT FROM audit_events e WHERE "
            "e.message_uuid = m.uuid AND e.action = 'message.receive' AND e.outcome <> 'duplicate') ORDER BY id"
        )
    ).scalars():
        yield f"messages {uuid}: its coming is not in the audit"
