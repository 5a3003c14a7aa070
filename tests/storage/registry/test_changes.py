"""Registry changes: each is one transaction with an audit row and a MAC, and never signs a changed row."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest

from receiver.errors import IntegrityError, NotFound
from receiver.storage.evidence.verify import verify
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.credentials import new_token
from receiver.storage.registry.loader import load_registry
from tests.storage.door import DESTINATION, SOURCE, Door, handler
from tests.storage.registry.registered import audited, version

CHANGES: dict[str, Callable[[Door], object]] = {
    "destination.set": lambda door: door.registration.set_destination(DESTINATION, door.now, {"enabled": False}),
    "credential.add": lambda door: door.registration.add_credential(
        DESTINATION, door.now, "token", {}, new_token().encode(), label="next", expires_at=door.now + timedelta(days=1)
    ),
    "credential.revoke": lambda door: door.registration.revoke_credential(
        door.value("SELECT id FROM credentials"), door.now
    ),
    "source.add": lambda door: door.registration.add_source(DESTINATION, "another", door.now, name="Another"),
    "source.disable": lambda door: door.registration.disable_source(DESTINATION, SOURCE, door.now),
    "handler.enable": lambda door: door.enable(handler("another")),
    "handler.disable": lambda door: door.registration.disable_handler(DESTINATION, "register", door.now),
    "handler.pause": lambda door: door.registration.pause_handler(
        "register", door.now, destination=DESTINATION, reason="test"
    ),
    "handler.resume": lambda door: door.registration.resume_handler("register", door.now, destination=None),
}


@pytest.mark.parametrize("action", CHANGES)
def test_each_change_is_audited_and_signed_and_makes_a_new_version(door: Door, action: str) -> None:
    """One audit row has action, actor and subject, and every MAC verifies."""
    door.enable()
    before = version(door), len(audited(door))
    CHANGES[action](door)
    assert (version(door), len(audited(door))) == (before[0] + 1, before[1] + 1)
    event = door.rows("SELECT * FROM audit_events ORDER BY id DESC LIMIT 1")[0]
    assert (event.action, event.outcome, event.actor, event.destination) == (action, "done", "tester@test", DESTINATION)
    table, _, number = event.subject.partition(":")
    assert door.value(f"SELECT count(*) FROM {table} WHERE id = {number}") == 1
    with door.engine.connect() as connection:
        assert verify(connection, door.keyring).first_bad is None


@pytest.mark.parametrize(
    "attempt",
    [
        lambda door: door.registration.set_destination("nowhere", door.now, {"enabled": True}),
        lambda door: door.registration.add_credential("nowhere", door.now, "token", {}, new_token().encode()),
        lambda door: door.registration.revoke_credential(99, door.now),
        lambda door: door.registration.add_source("nowhere", SOURCE, door.now, name=None),
        lambda door: door.registration.disable_source(DESTINATION, "nobody", door.now),
        lambda door: door.registration.enable_handler("nowhere", handler(), door.now),
        lambda door: door.registration.disable_handler(DESTINATION, "nothing", door.now),
        lambda door: door.registration.pause_handler("nothing", door.now, destination=None, reason="x"),
        lambda door: door.registration.resume_handler("register", door.now, destination="nowhere"),
    ],
)
def test_a_missing_row_is_not_changed(door: Door, attempt: Callable[[Door], object]) -> None:
    """The error makes neither a version nor an audit row."""
    before = version(door), audited(door)
    with pytest.raises(NotFound):
        attempt(door)
    assert (version(door), audited(door)) == before


@pytest.mark.parametrize(
    ("tampering", "change"),
    [
        ("UPDATE destinations SET sources_policy = 'any'", CHANGES["destination.set"]),
        ("UPDATE credentials SET digest = sha256('x')", CHANGES["credential.revoke"]),
        (
            "UPDATE sources SET enabled = false",
            lambda door: door.registration.add_source(DESTINATION, SOURCE, door.now, name=None),
        ),
        ("UPDATE subscriptions SET patterns = '{Order.*}'", lambda door: door.enable()),
    ],
)
def test_a_row_that_was_tampered_with_is_not_signed(
    door: Door, tampering: str, change: Callable[[Door], object]
) -> None:
    """Signing it again would make the tampering valid."""
    door.enable()
    door.rows(tampering)
    with pytest.raises(IntegrityError, match="audit verify"):
        change(door)
    with door.engine.connect() as connection:
        assert verify(connection, door.keyring).first_bad is not None


def test_a_changed_row_is_signed_with_the_newest_key(door: Door) -> None:
    """The old key is still needed for other rows."""
    rotated = door.keyring.with_new("mac", door.now + timedelta(seconds=1))
    RegistryChanges(door.engine, rotated, actor="a@b").set_destination(DESTINATION, door.now, {"enabled": False})
    assert door.value("SELECT mac_key FROM destinations") == rotated.current("mac").id
    assert door.value("SELECT mac_key FROM sources") == door.keyring.current("mac").id
    with door.engine.connect() as connection:
        assert verify(connection, rotated).first_bad is None
        assert load_registry(connection, rotated).destinations[DESTINATION].sources == {SOURCE: True}


def test_concurrent_changes_are_serialized(door: Door) -> None:
    """Each of eight concurrent changes gets its version and its audit row."""
    before = version(door)

    def change(n: int) -> None:
        RegistryChanges(door.engine, door.keyring, actor=f"{n}@test").add_source(
            DESTINATION, f"source-{n}", door.now, name=None
        )

    threads = [threading.Thread(target=change, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert version(door) == before + 8
    assert len(door.destination.sources) == 9
    with door.engine.connect() as connection:
        assert verify(connection, door.keyring).first_bad is None
