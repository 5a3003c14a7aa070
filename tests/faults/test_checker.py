"""The checker finds no violation on a correct site, and finds each kind of violation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import pytest
from sqlalchemy import Engine, text

from receiver.keyring import Keyring
from receiver.simulator.attempt_log import Attempt, AttemptLog
from receiver.storage.accept.ledger import MessageLedger as Storage
from receiver.storage.registry.changes import RegistryChanges
from tests.faults import checker, effects
from tests.storage.door import DESTINATION, SOURCE, Door, body, handler
from tests.storage.hand import Hand, arrive

LOGS = ("log-1", "log-2", "log-3")


@dataclass
class World:
    """Three messages that arrived one after another, each with two deliveries, and the logs of sender and handlers."""

    engine: Engine
    keyring: Keyring
    attempts: list[Attempt] = field(default_factory=list)
    journal: list[dict[str, Any]] = field(default_factory=list)

    def check(self) -> list[str]:
        """Return the violations."""
        ledger = AttemptLog()
        for attempt in self.attempts:
            ledger.record(attempt)
        with self.engine.connect() as connection:
            return checker.violations(
                checker.Evidence(
                    connection=connection, keyring=self.keyring, ledgers={DESTINATION: ledger}, journal=self.journal
                )
            )

    def execute(self, statement: str) -> None:
        """Execute statements that only a fault would cause."""
        with self.engine.begin() as connection:
            connection.execute(text(statement))


def sent(log: str, number: int, status: int | None = 200) -> Attempt:
    """Return an attempt that was answered before the next message was sent."""
    content = body(log)
    return Attempt(
        feed="f",
        message=log,
        number=1,
        kind="PatientAdmin.Arrival",
        attempt_id=None,
        status=status,
        sha256=sha256(content).hexdigest(),
        size=len(content),
        sent_at=10.0 * number,
        error=None,
        answered_at=10.0 * number + 5,
    )


@pytest.fixture
def world(engine: Engine, keyring: Keyring, registration: RegistryChanges) -> World:
    """A correct site."""
    made = World(engine, keyring)
    door = Door(engine, keyring, registration).build()
    for name in ("book", "outside"):
        door.enable(handler(name))
    storage = Storage(engine, keyring, quarantine_quota=1 << 30, on_commit=lambda _lanes: None)
    storage.start()
    arrive(door, storage, *map(body, LOGS))
    storage.stop()
    made.execute(effects.TABLE)
    for name in ("book", "outside"):
        Hand(engine, f"{name}/{DESTINATION}/source:{SOURCE}").take().succeed(3)
    made.execute("INSERT INTO effects (key, epoch) SELECT uuid || ':book:1', 1 FROM messages ORDER BY id")
    for number, log in enumerate(LOGS):
        made.attempts.append(sent(log, number))
        (uuid,) = door.rows("SELECT uuid FROM messages WHERE log_id = :log", log=log)[0]
        made.journal += [
            {
                "phase": phase,
                "handler": "outside",
                "destination": DESTINATION,
                "message": log,
                "key": f"{uuid}:outside:1",
                "replayed": False,
            }
            for phase in ("begin", "done")
        ]
    made.execute("INSERT INTO workers (name, host, pid, handlers) VALUES ('w', 'h', 1, '{book,outside}')")
    return made


def test_correct_site(world: World) -> None:
    """There is no violation on a correct site."""
    assert world.check() == []


def _book(log: str) -> str:
    return (
        f"(SELECT d.id FROM deliveries d JOIN messages m ON m.id = d.message_id "
        f"WHERE d.handler = 'book' AND m.log_id = '{log}')"
    )


BOOK_1, BOOK_3 = _book("log-1"), _book("log-3")
COLUMNS = (
    "destination_id, credential_ids, source_id, kind, query, test, log_id, received_at, peer, digest, size, "
    "state, id_conflict, mac, mac_key"
)
DOUBLED = (
    f"INSERT INTO messages (uuid, {COLUMNS}) SELECT gen_random_uuid(), {COLUMNS} FROM messages WHERE log_id = 'log-2'"
)
SWAPPED = (
    f"UPDATE delivery_attempts SET delivery_id = CASE delivery_id WHEN {BOOK_1} THEN {BOOK_3} ELSE {BOOK_1} END "
    f"WHERE delivery_id IN ({BOOK_1}, {BOOK_3})"
)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (DOUBLED, "log-2 is recorded 2 times"),
        ("UPDATE payloads SET sealed = sealed || 'x'::bytea", "is missing, or does not open"),
        ("DELETE FROM payloads", "is missing, or does not open"),
        (f"UPDATE deliveries SET state = 'pending' WHERE id = {BOOK_3}", "without a reason"),
        ("UPDATE messages SET state = 'quarantined' WHERE log_id = 'log-1'", "quarantined, with 2 deliveries"),
        ("DELETE FROM deliveries WHERE handler = 'book' OR handler = 'outside'", "accepted, with 0 deliveries"),
        (SWAPPED, "log-3 began before log-1"),
        (SWAPPED, "log-3 succeeded before log-1"),
        ("INSERT INTO effects (key, epoch) SELECT key, 2 FROM effects LIMIT 1", "succeeded, with 2 rows in `effects`"),
        ("DELETE FROM effects", "succeeded, with 0 rows in `effects`"),
        (f"UPDATE deliveries SET state = 'dead' WHERE id = {BOOK_3}", "dead, with 1 rows in `effects`"),
        ("INSERT INTO effects (key, epoch) VALUES ('x:book:1', 1)", "effects of x:book:1, which has no delivery"),
        ("UPDATE messages SET kind = 'Results.New' WHERE log_id = 'log-1'", "edited"),
        ("ALTER TABLE audit_events DISABLE TRIGGER ALL; DELETE FROM audit_events WHERE n = 1", "deleted"),
        (
            "ALTER TABLE audit_events DISABLE TRIGGER ALL; DELETE FROM audit_events WHERE action = 'message.receive'",
            "its receipt is not in the audit log",
        ),
    ],
)
def test_faults_in_the_database(world: World, fault: str, found: str) -> None:
    """Each fault in the database is found."""
    world.execute(fault)
    assert any(found in each for each in world.check()), world.check()


def _lose_message(world: World) -> None:
    world.attempts.append(sent("log-9", 9))


def _change_digest(world: World) -> None:
    world.attempts[0] = replace(world.attempts[0], sha256="0" * 64)


def _forget_attempt(world: World) -> None:
    del world.attempts[0]


def _refuse(world: World) -> None:
    world.attempts[0] = replace(world.attempts[0], status=401)


def _overtake(world: World) -> None:
    world.journal[:] = world.journal[4:] + world.journal[:4]


def _omit_calls(world: World) -> None:
    world.journal[:] = [line for line in world.journal if line["phase"] != "done"]


def _call_without_delivery(world: World) -> None:
    world.journal.append(world.journal[0] | {"key": "x:outside:1"})


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (_lose_message, "log-9 was answered 200 and is not recorded"),
        (_change_digest, "its digest was never sent"),
        (_forget_attempt, "log-1 was never sent"),
        (_refuse, "log-1 was refused ([401]) and is recorded"),
        (_overtake, "log-3 reached the external system before log-1"),
        (_omit_calls, "succeeded without a call to the external system"),
        (_call_without_delivery, "effects of x:outside:1, which has no delivery"),
    ],
)
def test_faults_in_the_logs(world: World, fault: Callable[[World], None], found: str) -> None:
    """Each difference between the logs of sender and handlers and the database is found."""
    fault(world)
    assert any(found in each for each in world.check()), world.check()


def test_overlapping_messages_have_no_order(world: World) -> None:
    """Messages that overlap have no order: neither was answered before the other was sent."""
    world.attempts[:] = [replace(attempt, sent_at=1.0) for attempt in world.attempts]
    _overtake(world)
    assert world.check() == []


def test_pending_for_a_reason(world: World) -> None:
    """A delivery may wait for a time, for an operator, or for a worker that has its handler."""
    world.execute(
        f"UPDATE deliveries SET state = 'pending' WHERE id = {BOOK_3}; DELETE FROM effects WHERE key IN ("
        f"SELECT uuid || ':book:1' FROM messages WHERE log_id = 'log-3')"
    )
    for undo, reason in (
        ("UPDATE lanes SET state = 'ready'", "UPDATE lanes SET state = 'held'"),
        ("UPDATE lanes SET state = 'ready'", "UPDATE lanes SET state = 'waiting', ready_at = now()"),
        ("UPDATE subscriptions SET paused_at = NULL", "UPDATE subscriptions SET paused_at = now()"),
        ("UPDATE deliveries SET ready_at = NULL", f"UPDATE deliveries SET ready_at = now() WHERE id = {BOOK_3}"),
        ("SELECT 1", "UPDATE workers SET handlers = '{outside}'"),
    ):
        world.execute(reason)
        assert world.check() == []
        world.execute(undo)
