"""The registry as it is loaded and followed: a row that does not prove to be ours opens nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from receiver import keyring as keyrings
from receiver.database import migrations
from receiver.database.engine import open_engine
from receiver.errors import UnknownKey
from receiver.keyring import Keyring, create
from receiver.pipeline import Admitted, Challenged, Refused
from receiver.protocol.registry import Destination, Registry, live
from receiver.protocol.verification.hmac import HmacCredential
from receiver.protocol.verification.token import TokenCredential
from receiver.storage import schema
from receiver.storage.evidence.macs import mac_key, row_mac
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.follower import POLL_INTERVAL, RegistryFollower
from receiver.storage.registry.key_records import record_keys
from receiver.storage.registry.loader import load_registry, unproved_rows
from tests.storage.door import DESTINATION, SOURCE, TOKEN, Door, body, handler, until
from tests.support.postgres import drop_database, new_database


def loaded(door: Door) -> Registry:
    with door.engine.connect() as connection:
        return load_registry(connection, door.keyring)


def reason(door: Door, content: bytes | None = None) -> str | None:
    """Why a message is refused, or None when it is let in."""
    verdict = door.judge(content or body())
    return verdict.reason if isinstance(verdict, Refused) else None


# --- loaded


def test_what_is_registered_is_what_is_loaded(door: Door) -> None:
    """Every column that the judges and the ledger look at."""
    expires = door.now + timedelta(days=1)
    door.registration.add_credential(
        DESTINATION,
        door.now,
        "hmac",
        {"header": "x-signature", "tolerance": 60},
        b"s" * 32,
        label="theirs",
        expires_at=expires,
    )
    door.registration.add_source(DESTINATION, None, door.now, name="nobody")
    door.enable(
        handler(
            "register",
            patterns=("PatientAdmin.*", "Order.New"),
            ordering="patient",
            patient_key="MR",
            acknowledge="after_handling",
            on_failure="hold",
            max_attempts=3,
            timeout=17.3,
        )
    )
    found = loaded(door).destinations[DESTINATION]
    assert (
        found.environment,
        found.enabled,
        found.require,
        found.sources_policy,
        found.on_unknown_source,
        found.test_messages,
    ) == ("production", True, (frozenset({"token"}),), "registered", "reject", "quarantine")
    assert found.sources == {SOURCE: True, None: True}
    token, signature = found.credentials
    assert isinstance(token, TokenCredential)
    assert isinstance(signature, HmacCredential)
    assert (signature.secret, signature.header, signature.tolerance, signature.expires_at) == (
        b"s" * 32,
        "x-signature",
        60,
        expires,
    )
    (subscription,) = found.subscriptions
    assert (
        subscription.handler,
        subscription.role,
        subscription.patterns,
        subscription.ordering,
        subscription.patient_key,
        subscription.acknowledge,
        subscription.on_failure,
        subscription.max_attempts,
        subscription.timeout,
        subscription.paused,
    ) == (
        "register",
        "handler",
        ("PatientAdmin.*", "Order.New"),
        "patient",
        "MR",
        "after_handling",
        "hold",
        3,
        17.3,
        False,
    )


def test_nothing_secret_is_in_the_rows_or_in_a_repr(door: Door) -> None:
    """A token is kept as a keyed digest, a signing secret sealed."""
    door.registration.add_credential(DESTINATION, door.now, "hmac", {}, b"canary-canary-canary-canary")
    rows = str(door.rows("SELECT * FROM credentials"))
    assert TOKEN not in rows + repr(loaded(door))
    assert "canary" not in rows + repr(loaded(door))


def test_an_empty_registry_is_one(engine: Engine, keyring: Keyring) -> None:
    """Known, and empty: everything is refused."""
    with engine.connect() as connection:
        assert load_registry(connection, keyring) == Registry(version=1, destinations={})


def test_what_is_disabled_revoked_or_expired_is_loaded_as_such(door: Door) -> None:
    """So that the audit can tell it from what was never there."""
    door.registration.revoke_credential(door.value("SELECT id FROM credentials"), door.now)
    door.registration.disable_source(DESTINATION, SOURCE, door.now)
    door.enable()
    door.registration.pause_handler("register", door.now, destination=None, reason="test")
    found = loaded(door).destinations[DESTINATION]
    assert found.sources == {SOURCE: False}
    assert not live(found.credentials[0], door.now)
    assert found.subscriptions[0].paused
    door.registration.disable_handler(DESTINATION, "register", door.now)
    door.registration.set_destination(DESTINATION, door.now, {"enabled": False})
    found = loaded(door).destinations[DESTINATION]
    assert (found.enabled, found.subscriptions) == (False, ())


# --- what was tampered with


@pytest.mark.parametrize(
    "edit",
    [
        "environment = 'development'",
        "require = '{}'",
        "require = '{hmac}'",
        "sources_policy = 'any'",
        "on_unknown_source = 'quarantine'",
        "test_messages = 'accept'",
        "reply_with = 'x'",
        "enabled = false",
        "mac = sha256(mac)",
        "name = 'other'",
    ],
)
def test_a_destination_that_was_changed_opens_nothing(door: Door, edit: str) -> None:
    """It is as if it were not registered: 401, with or without the right token."""
    assert reason(door) is None
    door.rows(f"UPDATE destinations SET {edit}")
    assert loaded(door).destinations == {}
    verdict = door.judge(body())
    assert isinstance(verdict, Refused)
    assert verdict.status == 401


@pytest.mark.parametrize(
    "edit",
    [
        "digest = sha256(digest)",
        "revoked_at = NULL, expires_at = now() + interval '1 day'",
        "kind = 'hmac'",
        "settings = '{\"a\": 1}'",
        "label = 'x'",
        "secret_key = 'x'",
        "mac = sha256(mac)",
    ],
)
def test_a_credential_that_was_changed_opens_nothing(door: Door, edit: str) -> None:
    """Neither with the old token nor, where a digest was put there, with a new one."""
    door.rows(f"UPDATE credentials SET {edit}")
    assert reason(door) == "token_wrong"
    assert not isinstance(door.judge(body(), token="another token that was put there"), Admitted)


def test_a_credential_moved_to_another_destination_opens_nothing(door: Door) -> None:
    """The destination's id is signed too."""
    door.registration.add_destination(
        "ward",
        door.now,
        environment="production",
        require=["token"],
        sources_policy="registered",
        on_unknown_source="reject",
        test_messages="accept",
        reply_with=None,
        token="the ward's token, a long one",
    )
    door.rows("UPDATE credentials SET destination_id = (SELECT id FROM destinations WHERE name = 'clinic')")
    assert reason(door) is None
    verdict = door.judge(body(), token="the ward's token, a long one")
    assert isinstance(verdict, Refused)
    assert verdict.status == 401


def test_a_token_that_was_put_there_by_hand_opens_nothing(door: Door) -> None:
    """Somebody with the database and without the keyring copies a row that holds."""
    door.rows(
        "INSERT INTO credentials (destination_id, kind, digest, secret_key, mac, mac_key) "
        "SELECT destination_id, kind, sha256('x'), secret_key, mac, mac_key FROM credentials"
    )
    assert len(loaded(door).destinations[DESTINATION].credentials) == 1


@pytest.mark.parametrize("policy", ["registered", "any"])
def test_a_source_that_was_changed_lets_nobody_in(door: Door, policy: str) -> None:
    """A disabled one that was enabled by hand stays disabled, also where any source may in."""
    door.registration.set_destination(DESTINATION, door.now, {"sources_policy": policy})
    door.registration.disable_source(DESTINATION, SOURCE, door.now)
    door.rows("UPDATE sources SET enabled = true")
    assert reason(door) == "source_disabled"


def test_a_source_that_was_put_there_by_hand_lets_nobody_in(door: Door) -> None:
    """Its row holds for another id."""
    door.rows(
        "INSERT INTO sources (destination_id, source_id, enabled, mac, mac_key) "
        "SELECT destination_id, 'somebody', true, mac, mac_key FROM sources"
    )
    assert reason(door, body(source="somebody")) == "source_disabled"


@pytest.mark.parametrize(
    "edit",
    [
        "patterns = '{Order.*}'",
        "handler = 'other'",
        "acknowledge = 'after_handling'",
        "enabled = true",
        "timeout = 1",
        "role = 'responder'",
    ],
)
def test_a_subscription_that_was_changed_gets_nothing(door: Door, edit: str) -> None:
    """No handler is run that nobody enabled."""
    door.enable()
    if edit.startswith("enabled"):
        door.registration.disable_handler(DESTINATION, "register", door.now)
    door.rows(f"UPDATE subscriptions SET {edit}")
    assert loaded(door).destinations[DESTINATION].subscriptions == ()


@pytest.mark.parametrize("table", ["destinations", "credentials", "sources", "subscriptions"])
def test_a_row_under_a_key_that_this_host_lacks_is_not_left_out(door: Door, table: str) -> None:
    """Left out it would be a 401, 403 or a lost delivery: the registry is not loaded, and the error names the key."""
    door.enable()
    door.rows(f"UPDATE {table} SET mac_key = 'mac-0'")
    with pytest.raises(UnknownKey, match="mac-0"):
        loaded(door)
    with door.engine.connect() as connection, pytest.raises(UnknownKey):
        load_registry(connection, create(door.now))
    with door.engine.connect() as connection:
        assert {(each.table, each.destination, each.key) for each in unproved_rows(connection, door.keyring)} == {
            (table, DESTINATION, "mac-0")
        }


def test_a_secret_sealed_with_a_key_that_this_host_lacks_is_not_left_out(door: Door, keyring: Keyring) -> None:
    """A credential without its secret would refuse what is valid."""
    door.registration.add_credential(DESTINATION, door.now, "hmac", {}, b"s" * 32)
    without = Keyring(key for key in keyring.keys if key.purpose != "secret")
    with door.engine.connect() as connection, pytest.raises(UnknownKey, match="secret-"):
        load_registry(connection, without)


def test_one_row_that_cannot_be_read_hides_no_other(door: Door) -> None:
    """A kind that only a later version knows is left out, and the rest is there."""
    door.registration.add_destination(
        "ward",
        door.now,
        environment="production",
        require=["token"],
        sources_policy="registered",
        on_unknown_source="reject",
        test_messages="accept",
        reply_with=None,
        token="the ward's token, a long one",
    )
    assert set(loaded(door).destinations) == {DESTINATION, "ward"}
    sign(door, "destinations", "require = '{telepathy}'", "name = 'ward'")
    assert set(loaded(door).destinations) == {DESTINATION}


def sign(door: Door, table: str, edit: str, where: str) -> None:
    """Change a row as a later version would: signed."""
    found = schema.metadata.tables[table]
    door.rows(f"UPDATE {table} SET {edit} WHERE {where}")
    with door.engine.begin() as connection:
        row = connection.execute(found.select().where(text(where))).mappings().one()
        mac = row_mac(mac_key(door.keyring[row["mac_key"]]), table, {**row})
        connection.execute(found.update().where(text(where)).values(mac=mac))


# --- followed


@pytest.fixture
def follower(door: Door, keyring_path: Path) -> Iterator[RegistryFollower]:
    follower = RegistryFollower(door.engine, door.keyring)
    follower.start()
    yield follower
    follower.stop()


def known(follower: RegistryFollower) -> Destination:
    assert follower.current is not None
    return follower.current.destinations[DESTINATION]


def test_it_is_there_as_soon_as_it_is_started(follower: RegistryFollower) -> None:
    """No request is refused because nobody has looked yet."""
    assert known(follower).name == DESTINATION


def test_a_change_is_followed_within_a_second(door: Door, follower: RegistryFollower) -> None:
    """On every host, whatever was changed."""
    door.registration.disable_source(DESTINATION, SOURCE, door.now)
    until(lambda: known(follower).sources == {SOURCE: False}, "the source")
    door.registration.revoke_credential(known(follower).credentials[0].id, door.now)
    until(lambda: not live(known(follower).credentials[0], door.now), "the credential")
    door.enable()
    until(lambda: known(follower).subscriptions, "the handler")
    door.registration.pause_handler("register", door.now, destination=None, reason="test")
    until(lambda: known(follower).subscriptions[0].paused, "the pause")
    assert POLL_INTERVAL < 1


def test_what_does_not_change_is_not_loaded_again(door: Door, follower: RegistryFollower) -> None:
    """One small question is asked each time."""
    before = follower.current
    asked = door.value("SELECT version FROM registry_version")
    threading.Event().wait(3 * POLL_INTERVAL)
    assert follower.current is before
    assert before is not None
    assert before.version == asked


def test_the_last_one_is_kept_while_it_cannot_be_read(door: Door, follower: RegistryFollower) -> None:
    """Requests are judged by it; when it can be read again, changes are followed again."""
    before = follower.current
    door.rows("ALTER TABLE registry_version RENAME TO elsewhere")
    threading.Event().wait(3 * POLL_INTERVAL)
    assert follower.current is before
    door.rows("ALTER TABLE elsewhere RENAME TO registry_version")
    door.registration.disable_source(DESTINATION, SOURCE, door.now)
    until(lambda: known(follower).sources == {SOURCE: False}, "the change")


def test_it_never_goes_back(door: Door, follower: RegistryFollower, capsys: pytest.CaptureFixture[str]) -> None:
    """A database that is put back does not bring back what was revoked; what is changed afterwards is followed."""
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


def test_it_is_unknown_as_long_as_it_was_never_loaded(keyring: Keyring) -> None:
    """Not empty: a receiver that knows nothing says 503. It is loaded as soon as that works."""
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


def test_a_follower_without_its_key_says_so_and_goes_on(
    door: Door, keyring_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The keyring holds no index key: nothing is known, and the log names the key and the setting."""
    keyring = Keyring(key for key in door.keyring.keys if key.purpose != "index")
    follower = RegistryFollower(door.engine, keyring)
    follower.start()
    assert follower.current is None
    said = capsys.readouterr().out
    assert door.keyring.current("index").id in said
    assert "RECEIVER_KEYRING" in said
    follower.stop()


def test_a_key_that_is_missing_keeps_the_registry_in_force(door: Door, keyring_path: Path) -> None:
    """Until the keyring file has it: then the change is taken, without a restart."""
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


def test_a_handshake_is_judged_by_what_was_loaded(door: Door) -> None:
    """The whole way, from row to verdict."""
    assert isinstance(door.challenge(), Challenged)
