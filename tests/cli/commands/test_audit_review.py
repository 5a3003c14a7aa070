"""`audit review`: what is shown since the last review, and the record of it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from receiver.keyring import Keyring
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import Door

WHY = ("--reason", "weekly")


def record(door: Door, keyring: Keyring, *events: AuditEvent) -> None:
    """Write audit rows."""
    with door.engine.begin() as connection:
        write(connection, AuditChain(keyring, Sealer(keyring)), events)


def event(action: str, **more: object) -> AuditEvent:
    """Return an event of Redox's at the destination `feed`, unless `more` says otherwise."""
    values: dict[str, object] = {"outcome": "refused", "at": datetime.now(UTC), "actor": "redox", "destination": "feed"}
    return AuditEvent(action=action, **(values | more))  # type: ignore[arg-type]


@pytest.fixture
def busy(door: Door, keyring: Keyring, run: Commands) -> None:
    """A day: messages, refusals of all sorts, a change of the registry and of the keys, two disclosures."""
    record(
        door,
        keyring,
        *[event("query.answer", outcome="answered") for _ in range(3)],
        event("message.refuse", actor="stranger", reason="token_wrong", count=400),
        event("message.refuse", actor="stranger", reason="token_expired", count=7),
        event("message.refuse", reason="source_unknown"),
        event("message.refuse", reason="source_unknown"),
        event("message.disclose", outcome="disclosed", actor="alice@ops", reason="break_glass"),
        event("message.disclose", outcome="disclosed", actor="alice@ops", reason="break_glass"),
        event("destination.handshake", outcome="done"),
    )
    run("source", "add", "clinic", "22222222-2222-4222-8222-222222222222")
    run("keys", "new", "session")


def test_what_is_shown(busy: None, run: Commands) -> None:
    """Sums by actor, disclosures first. Strangers' refusals, answers and handshakes are not for a review."""
    found = run.json("audit", "review")
    rows = [(each["about"], each["action"], each["reason"], each["actor"], each["count"]) for each in found]
    assert rows[:3] == [
        ("disclosure", "message.disclose", "break_glass", "alice@ops", 2),
        ("refusal", "message.refuse", "source_unknown", "redox", 2),
        ("refusal", "message.refuse", "token_expired", "stranger", 7),
    ]
    assert ("key", "key.new", None, ACTOR, 1) in rows
    assert ("registry", "source.add", None, ACTOR, 1) in rows
    assert {each["action"] for each in found}.isdisjoint({"query.answer", "destination.handshake"})
    assert "token_wrong" not in {each["reason"] for each in found}


def test_after_a_sign_off(busy: None, run: Commands) -> None:
    """The next review begins after it; the record names the reviewer and the rows, and itself needs no review."""
    shown = run.json("audit", "review", "--sign-off", *WHY)
    (row,) = run.json("audit", "list", "--action", "audit.review", "--notes", *WHY)
    assert (row["actor"], row["outcome"], row["note"]) == (ACTOR, "done", "weekly")
    assert row["detail"]["lines"] == len(shown)
    assert row["detail"]["last"] == row["id"] - 1
    assert [each["action"] for each in run.json("audit", "review")] == ["audit.disclose"]
    assert ACTOR in run("audit", "review").stderr
    assert len(run.json("audit", "review", "--after", "0")) == len(shown) + 1
    assert run.json("audit", "verify")["first_bad"] is None


def test_a_sign_off_needs_words(run: Commands) -> None:
    """Without them nothing is recorded."""
    assert "--reason" in run.fails("audit", "review", "--sign-off", status=2)
    assert run.json("audit", "list", "--action", "audit.review") == []
