"""The registry follower: changes, an unavailable database, an older version, and missing keys."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from receiver import keyring as keyrings
from receiver.database import migrations
from receiver.database.engine import open_engine
from receiver.keyring import Keyring
from receiver.protocol.registry import Destination, live
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.follower import POLL_INTERVAL, RegistryFollower
from receiver.storage.registry.key_records import record_keys
from tests.storage.door import DESTINATION, SOURCE, Door
from tests.support.postgres import drop_database, new_database
from tests.support.waiting import until


@pytest.fixture
def follower(door: Door, keyring_path: Path) -> Iterator[RegistryFollower]:
    follower = RegistryFollower(door.engine, door.keyring)
    follower.start()
    yield follower
    follower.stop()


def known(follower: RegistryFollower) -> Destination:
    assert follower.current is not None
    return follower.current.destinations[DESTINATION]


def test_it_is_loaded_when_start_returns(follower: RegistryFollower) -> None:
    """No request is refused because the registry is not loaded yet."""
    assert known(follower).name == DESTINATION


def test_a_change_is_followed_within_a_second(door: Door, follower: RegistryFollower) -> None:
    """Each kind of change is followed."""
    door.registration.disable_source(DESTINATION, SOURCE, door.now)
    until(lambda: known(follower).sources == {SOURCE: False}, "the source")
    door.registration.revoke_credential(known(follower).credentials[0].id, door.now)
    until(lambda: not live(known(follower).credentials[0], door.now), "the credential")
    door.enable()
    until(lambda: known(follower).subscriptions, "the handler")
    door.registration.pause_handler("register", door.now, destination=None, reason="test")
    until(lambda: known(follower).subscriptions[0].paused, "the pause")
    assert POLL_INTERVAL < 1


def test_an_unchanged_registry_is_not_loaded_again(door: Door, follower: RegistryFollower) -> None:
    """Each poll reads only the version."""
    before = follower.current
    asked = door.value("SELECT version FROM registry_version")
    threading.Event().wait(3 * POLL_INTERVAL)
    assert follower.current is before
    assert before is not None
    assert before.version == asked


def test_the_last_registry_is_kept_while_the_database_is_unavailable(door: Door, follower: RegistryFollower) -> None:
    """When the database can be read again, changes are followed again."""
    before = follower.current
    door.rows("ALTER TABLE registry_version RENAME TO elsewhere")
    threading.Event().wait(3 * POLL_INTERVAL)
    assert follower.current is before
    door.rows("ALTER TABLE elsewhere RENAME TO registry_version")
    door.registration.disable_source(DESTINATION, SOURCE, door.now)
    until(lambda: known(follower).sources == {SOURCE: False}, "the change")


def test_an_older_version_is_not_loaded(
    door: Door, follower: RegistryFollower, capsys: pytest.CaptureFixture[str]
) -> None:
    """A restored database does not bring back a revoked credential; later changes are followed."""
    before = door.rows("SELECT version, (SELECT mac FROM credentials) AS mac FROM registry_version")[0]
    door.registration.revoke_credential(known(follower).credentials[0].id, door.now)
    until(lambda: not live(known(follower).credentials[0], door.now), "the credential")
    with door.engine.begin() as connection:
        connection.execute(text("UPDATE credentials SET revoked_at = NULL, mac = :mac"), {"mac": before.mac})
        connection.execute(text("UPDATE registry_version SET version = :version"), {"version": before.version})
    until(lambda: "registry.went_back" in capsys.readouterr().out, "the log line")
    threading.Event().wait(3 * POLL_INTERVAL)
    assert not live(known(follower).credentials[0], door.now)
    assert "registry.went_back" not in capsys.readouterr().out
    door.registration.disable_source(DESTINATION, SOURCE, door.now)
    until(lambda: known(follower).sources == {SOURCE: False}, "the change")


def test_it_is_none_until_it_is_loaded(keyring: Keyring) -> None:
    """It is None, not empty: the receiver answers 503. It is loaded as soon as that works."""
    url = new_database()
    engine = open_engine(url, pooled=False)
    follower = RegistryFollower(engine, keyring)
    follower.start()
    versions = [follower.current and follower.current.version]
    migrations.upgrade(engine)
    with engine.begin() as connection:
        record_keys(connection, keyring)
    until(lambda: follower.current, "the registry")
    versions.append(follower.current and follower.current.version)
    follower.stop()
    drop_database(url)
    assert versions == [None, 1]


def test_a_follower_without_its_key(door: Door, keyring_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an index key in the keyring nothing is loaded, and the log names the key and the setting."""
    keyring = Keyring(key for key in door.keyring.keys if key.purpose != "index")
    follower = RegistryFollower(door.engine, keyring)
    follower.start()
    assert follower.current is None
    printed = capsys.readouterr().out
    assert door.keyring.current("index").id in printed
    assert "RECEIVER_KEYRING" in printed
    follower.stop()


def test_a_missing_key_keeps_the_registry_in_force(door: Door, keyring_path: Path) -> None:
    """When the keyring file has the key, the change is loaded without a restart."""
    follower = RegistryFollower(door.engine, keyrings.load_keyring(keyring_path))
    follower.start()
    before = follower.current
    ring = door.keyring.with_new("mac", door.now)
    with door.engine.begin() as connection:
        record_keys(connection, ring)
    RegistryChanges(door.engine, ring, actor="tester@test").disable_source(DESTINATION, SOURCE, door.now)
    until(lambda: follower.doubt, "the doubt")
    assert ring.current("mac").id in str(follower.doubt)
    assert follower.current is before
    ring.save(keyring_path)
    until(lambda: known(follower).sources == {SOURCE: False}, "the change")
    assert follower.doubt is None
    follower.stop()
