"""Changes of the registry: each one transaction with its audit row, signed, and none that proves what is not ours."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from receiver.errors import ConfigurationError, Conflict, IntegrityError, NotFound
from receiver.keyring import Keyring, create
from receiver.protocol.registry import live
from receiver.storage.evidence.verify import verify
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.credentials import new_token
from receiver.storage.registry.key_records import check_keys, record_keys
from receiver.storage.registry.loader import load_registry
from tests.storage.door import DESTINATION, SOURCE, TOKEN, Door, body, handler


def version(door: Door) -> int:
    return int(door.value("SELECT version FROM registry_version"))


def audited(door: Door) -> list[tuple[str, str]]:
    return [(row.action, row.subject) for row in door.rows("SELECT action, subject FROM audit_events ORDER BY id")]


def add(door: Door, name: str, **changes: Any) -> int:
    declared: dict[str, Any] = {
        "environment": "staging",
        "require": ["token"],
        "sources_policy": "registered",
        "on_unknown_source": "reject",
        "test_messages": "accept",
        "reply_with": None,
        "token": new_token(),
    }
    return door.registration.add_destination(name, door.now, **declared | changes)


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
def test_each_change_is_audited_signed_and_makes_a_new_version(door: Door, action: str) -> None:
    """One audit row that says what, who and which row; every row still proves to be ours."""
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


def test_adding_a_destination_makes_it_and_its_token(door: Door) -> None:
    """The token opens it, and stands nowhere."""
    token = new_token()
    number = add(door, "ward", token=token)
    assert audited(door)[-1] == ("destination.add", f"destinations:{number}")
    assert door.value("SELECT count(*) FROM credentials WHERE destination_id = :id AND kind = 'token'", id=number) == 1
    assert token not in str(door.rows("SELECT * FROM credentials")) + str(door.rows("SELECT * FROM audit_events"))


def test_a_token_is_long_random_and_of_letters_a_dashboard_takes() -> None:
    """256 bits; none comes twice."""
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) == 43 and token.replace("-", "").replace("_", "").isalnum() for token in tokens)


@pytest.mark.parametrize("token", ["", "x" * 23, "ä" * 30, "x" * 30 + "\n", " " + "x" * 30, "x" * 30 + "\0"])
def test_a_token_that_could_be_guessed_or_not_be_sent_is_not_taken(door: Door, token: str) -> None:
    """Under 24 characters, beyond ASCII, or with what a header cannot hold; and nothing is left of the attempt."""
    before = version(door), audited(door)
    with pytest.raises(ConfigurationError, match="at least 24 printable ASCII"):
        add(door, "ward", token=token)
    with pytest.raises(ConfigurationError, match="at least 24 printable ASCII"):
        door.registration.add_credential(DESTINATION, door.now, "token", {}, token.encode())
    assert (version(door), audited(door)) == before
    assert door.value("SELECT count(*) FROM destinations") == 1


@pytest.mark.parametrize("name", ["", "Clinic", "clinic/ward", "-clinic", "clinic-", "c" * 65, "clinic\n", "clïnic"])
def test_a_name_that_is_no_part_of_a_url_is_not_taken(door: Door, name: str) -> None:
    """It stands in the URL and in the names of lanes."""
    with pytest.raises(ConfigurationError, match="not a valid destination name"):
        add(door, name)


def test_a_name_that_is_taken_says_which_command_shows_it(door: Door) -> None:
    """And the chain of audit rows has no gap from the attempt."""
    with pytest.raises(Conflict, match="destination show clinic"):
        add(door, DESTINATION)
    add(door, "ward")
    with door.engine.connect() as connection:
        assert verify(connection, door.keyring).first_bad is None


def test_a_value_that_the_table_does_not_take_is_no_conflict(door: Door) -> None:
    """Only a name that is taken is. Guards the code in `_insert`."""
    with pytest.raises(DBAPIError, match="CheckViolation 23514"):
        add(door, "ward", environment="moon")


@pytest.mark.parametrize("require", [[], ["telepathy"], ["token+telepathy"], [""]])
def test_a_requirement_that_nothing_can_fulfil_is_not_taken(door: Door, require: list[str]) -> None:
    """Neither when it is made nor when it is changed."""
    with pytest.raises(ConfigurationError, match="--require"):
        add(door, "ward", require=require)
    with pytest.raises(ConfigurationError, match="--require"):
        door.registration.set_destination(DESTINATION, door.now, {"require": require})


def test_adding_a_credential_never_widens_the_door(door: Door) -> None:
    """What is required is stored, not derived from what happens to be live."""
    door.registration.add_credential(DESTINATION, door.now, "hmac", {}, b"s" * 32)
    assert door.destination.require == (frozenset({"token"}),)


def test_a_weak_or_misdescribed_signing_secret_is_not_taken(door: Door) -> None:
    """Too short, or with a setting that nothing reads."""
    for secret, settings in ((b"short", {}), (b"s" * 32, {"hedaer": "x"})):
        with pytest.raises(ConfigurationError):
            door.registration.add_credential(DESTINATION, door.now, "hmac", settings, secret)
    assert door.value("SELECT count(*) FROM credentials") == 1


def test_a_credential_is_revoked_once_and_for_good(door: Door) -> None:
    """The second time there is nothing to do; the row stays for the audit."""
    number = door.value("SELECT id FROM credentials")
    door.registration.revoke_credential(number, door.now)
    assert not live(door.destination.credentials[0], door.now)
    with pytest.raises(Conflict, match="revoked already"):
        door.registration.revoke_credential(number, door.now)


def test_two_tokens_are_live_while_rotating(door: Door) -> None:
    """Until the old one is revoked."""
    token = new_token()
    door.registration.add_credential(DESTINATION, door.now, "token", {}, token.encode())
    assert door.admit(body()).verified.credentials != door.admit(body(), token=token).verified.credentials
    door.registration.revoke_credential(door.admit(body(), token=TOKEN).verified.credentials[0], door.now)
    assert door.refuse(body(), token=TOKEN).status == 401
    door.admit(body(), token=token)


def test_a_source_is_registered_as_it_is_compared(door: Door) -> None:
    """With `urn:uuid:` or in capitals it is the same one; it is enabled again, not a second time there."""
    for written in (f"urn:uuid:{SOURCE}", SOURCE.upper()):
        door.registration.disable_source(DESTINATION, written, door.now)
        assert door.destination.sources == {SOURCE: False}
        door.registration.add_source(DESTINATION, written, door.now, name=None)
        assert door.destination.sources == {SOURCE: True}


def test_messages_that_name_no_source_are_registered_as_such(door: Door) -> None:
    """`None`, apart from any id; an empty id is none."""
    door.registration.add_source(DESTINATION, None, door.now, name=None)
    door.registration.add_source(DESTINATION, None, door.now, name="nobody")
    assert door.destination.sources == {SOURCE: True, None: True}
    assert door.value("SELECT name FROM sources WHERE source_id IS NULL") == "nobody"
    for empty in ("", "urn:uuid:"):
        with pytest.raises(ConfigurationError, match="--none"):
            door.registration.add_source(DESTINATION, empty, door.now, name=None)


def test_a_handler_is_bound_again_as_it_is_declared_now(door: Door) -> None:
    """One row; what it says, and enabled."""
    door.enable(handler(timeout=10.0))
    door.registration.disable_handler(DESTINATION, "register", door.now)
    door.enable(handler(timeout=0.5, patterns=("Order.*",)))
    (subscription,) = door.destination.subscriptions
    assert (subscription.timeout, subscription.patterns) == (0.5, ("Order.*",))


def test_a_query_has_one_responder(door: Door) -> None:
    """Another is told which one there is; once that is disabled it may. A handler beside it is no matter."""
    door.enable(handler("search", role="responder", patterns=("PatientSearch.Query",)))
    door.enable(handler("watch", patterns=("PatientSearch.Query",)))
    other = handler("search2", role="responder", patterns=("Media.Query", "PatientSearch.Query"))
    with pytest.raises(Conflict, match=r"PatientSearch\.Query is answered by search at clinic"):
        door.enable(other)
    door.registration.disable_handler(DESTINATION, "search", door.now)
    door.enable(other)


def test_only_what_is_declared_otherwise_is_written_down_again(door: Door) -> None:
    """Each start of a worker is no change; a declaration that changed is one, where it is enabled."""
    door.enable(handler("a", timeout=17.3))
    door.enable(handler("b"))
    door.registration.disable_handler(DESTINATION, "b", door.now)
    before = version(door)
    door.registration.refresh_handlers([handler("a", timeout=17.3), handler("b", timeout=5.0), handler("c")], door.now)
    assert version(door) == before
    door.registration.refresh_handlers([handler("a", max_attempts=3)], door.now)
    assert version(door) == before + 1
    assert door.destination.subscriptions[0].max_attempts == 3


def test_a_pause_is_of_every_binding_or_of_one(door: Door) -> None:
    """How many it were is told; the rows' MACs hold, for a pause is a state of work."""
    add(door, "ward")
    door.enable()
    door.registration.enable_handler("ward", handler(), door.now)
    assert door.registration.pause_handler("register", door.now, destination=None, reason="dead") == 2
    assert door.registration.resume_handler("register", door.now, destination="ward") == 1
    assert door.destination.subscriptions[0].paused
    assert door.value("SELECT pause_reason FROM subscriptions WHERE paused_at IS NOT NULL") == "dead"


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
def test_what_is_not_there_is_not_changed(door: Door, attempt: Callable[[Door], object]) -> None:
    """Neither a version nor an audit row comes of it."""
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
def test_a_change_never_proves_what_somebody_else_did(
    door: Door, tampering: str, change: Callable[[Door], object]
) -> None:
    """Signing a row anew would make the tampering ours. Guards the proof in `_update`."""
    door.enable()
    door.rows(tampering)
    with pytest.raises(IntegrityError, match="audit verify"):
        change(door)
    with door.engine.connect() as connection:
        assert verify(connection, door.keyring).first_bad is not None


def test_a_row_that_is_changed_is_signed_with_the_newest_key(door: Door) -> None:
    """The old key is still needed for the rows that nobody touched."""
    rotated = door.keyring.with_new("mac", door.now + timedelta(seconds=1))
    RegistryChanges(door.engine, rotated, actor="a@b").set_destination(DESTINATION, door.now, {"enabled": False})
    assert door.value("SELECT mac_key FROM destinations") == rotated.current("mac").id
    assert door.value("SELECT mac_key FROM sources") == door.keyring.current("mac").id
    with door.engine.connect() as connection:
        assert verify(connection, rotated).first_bad is None
        assert load_registry(connection, rotated).destinations[DESTINATION].sources == {SOURCE: True}


def test_changes_at_once_come_one_after_another(door: Door) -> None:
    """Eight commands at a time: each gets its version and its audit row, and none is lost."""
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


# --- fingerprints


def test_a_host_with_the_right_keyring_may_start(engine: Engine, keyring: Keyring) -> None:
    """Its keys are on record; recording them twice, or at once, is no matter; a new one is added."""
    with engine.begin() as first, engine.begin() as second:
        record_keys(first, keyring)
        thread = threading.Thread(target=record_keys, args=(second, keyring))
        thread.start()
        first.commit()
        thread.join()
    with engine.begin() as connection:
        check_keys(connection, keyring)
        grown = keyring.with_new("payload", keyring.keys[0].created)
        check_keys(connection, grown)
        record_keys(connection, grown)
        with pytest.raises(ConfigurationError, match=f"this host lacks key {grown.keys[-1].id}"):
            check_keys(connection, keyring)


def test_a_host_with_another_keyring_may_not(engine: Engine, keyring: Keyring) -> None:
    """It lacks a key, or holds another under the same id; or nobody ever recorded any."""
    with engine.begin() as connection:
        with pytest.raises(ConfigurationError, match="keys init"):
            check_keys(connection, keyring)
        record_keys(connection, keyring)
        with pytest.raises(ConfigurationError, match="RECEIVER_KEYRING"):
            check_keys(connection, create(keyring.keys[0].created))
        connection.exec_driver_sql("UPDATE keys SET fingerprint = 'x' WHERE purpose = 'index'")
        with pytest.raises(ConfigurationError, match=f"holds another key {keyring.current('index').id}"):
            check_keys(connection, keyring)


def test_no_key_is_in_the_database(engine: Engine, keyring: Keyring) -> None:
    """Fingerprints are."""
    with engine.begin() as connection:
        record_keys(connection, keyring)
        rows = str(connection.exec_driver_sql("SELECT * FROM keys").all())
    assert not [key for key in keyring.keys if key.secret.hex() in rows]
