"""The registry as it is loaded: a row whose MAC fails is not in force."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import Engine, text

from receiver.errors import UnknownKey
from receiver.keyring import Keyring, create
from receiver.pipeline import Admitted, Challenged, Refused
from receiver.protocol.registry import Registry, live
from receiver.protocol.verification.hmac import HmacCredential
from receiver.protocol.verification.token import TokenCredential
from receiver.storage import schema
from receiver.storage.evidence.macs import mac_key, row_mac
from receiver.storage.registry.loader import load_registry, unverified_rows
from tests.storage.door import DESTINATION, SOURCE, TOKEN, Door, body, handler


def loaded(door: Door) -> Registry:
    with door.engine.connect() as connection:
        return load_registry(connection, door.keyring)


def reason(door: Door, content: bytes | None = None) -> str | None:
    """Return the reason why a message is refused; None if it is accepted."""
    verdict = door.judge(content or body())
    return verdict.reason if isinstance(verdict, Refused) else None


def test_every_column_is_loaded(door: Door) -> None:
    """Every column that verification and the ledger need."""
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
    """A token is stored as a keyed digest, a signing secret encrypted."""
    door.registration.add_credential(DESTINATION, door.now, "hmac", {}, b"canary-canary-canary-canary")
    rows = str(door.rows("SELECT * FROM credentials"))
    assert TOKEN not in rows + repr(loaded(door))
    assert "canary" not in rows + repr(loaded(door))


def test_an_empty_registry(engine: Engine, keyring: Keyring) -> None:
    """It is loaded and empty: every request is refused."""
    with engine.connect() as connection:
        assert load_registry(connection, keyring) == Registry(version=1, destinations={})


def test_disabled_revoked_and_expired_rows_are_loaded(door: Door) -> None:
    """The audit distinguishes them from rows that never existed."""
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
def test_a_changed_destination_is_not_in_force(door: Door, edit: str) -> None:
    """It counts as not registered: 401, with or without the right token."""
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
def test_a_changed_credential_is_not_in_force(door: Door, edit: str) -> None:
    """Neither the old token is accepted nor the token of an inserted digest."""
    door.rows(f"UPDATE credentials SET {edit}")
    assert reason(door) == "token_wrong"
    assert not isinstance(door.judge(body(), token="another token that was put there"), Admitted)


def test_a_credential_moved_to_another_destination(door: Door) -> None:
    """It is not in force: the MAC covers the destination's id."""
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


def test_a_copied_token(door: Door) -> None:
    """A valid row that was copied in the database is not in force."""
    door.rows(
        "INSERT INTO credentials (destination_id, kind, digest, secret_key, mac, mac_key) "
        "SELECT destination_id, kind, sha256('x'), secret_key, mac, mac_key FROM credentials"
    )
    assert len(loaded(door).destinations[DESTINATION].credentials) == 1


@pytest.mark.parametrize("policy", ["registered", "any"])
def test_a_changed_source_is_not_in_force(door: Door, policy: str) -> None:
    """A disabled source that was enabled in the database stays disabled, even if any source is accepted."""
    door.registration.set_destination(DESTINATION, door.now, {"sources_policy": policy})
    door.registration.disable_source(DESTINATION, SOURCE, door.now)
    door.rows("UPDATE sources SET enabled = true")
    assert reason(door) == "source_disabled"


def test_a_copied_source(door: Door) -> None:
    """It is not in force: its MAC is for another id."""
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
def test_a_changed_subscription_is_not_in_force(door: Door, edit: str) -> None:
    """A handler that was not enabled does not run."""
    door.enable()
    if edit.startswith("enabled"):
        door.registration.disable_handler(DESTINATION, "register", door.now)
    door.rows(f"UPDATE subscriptions SET {edit}")
    assert loaded(door).destinations[DESTINATION].subscriptions == ()


@pytest.mark.parametrize("table", ["destinations", "credentials", "sources", "subscriptions"])
def test_a_row_under_a_key_that_this_host_lacks_is_not_left_out(door: Door, table: str) -> None:
    """Leaving it out would cause a 401, a 403 or a lost delivery: the registry is not loaded, and the error names the
    key.
    """
    door.enable()
    door.rows(f"UPDATE {table} SET mac_key = 'mac-0'")
    with pytest.raises(UnknownKey, match="mac-0"):
        loaded(door)
    with door.engine.connect() as connection, pytest.raises(UnknownKey):
        load_registry(connection, create(door.now))
    with door.engine.connect() as connection:
        assert {(each.table, each.destination, each.key) for each in unverified_rows(connection, door.keyring)} == {
            (table, DESTINATION, "mac-0")
        }


def test_a_secret_sealed_with_a_key_that_this_host_lacks_is_not_left_out(door: Door, keyring: Keyring) -> None:
    """A credential without its secret would refuse valid requests."""
    door.registration.add_credential(DESTINATION, door.now, "hmac", {}, b"s" * 32)
    without = Keyring(key for key in keyring.keys if key.purpose != "secret")
    with door.engine.connect() as connection, pytest.raises(UnknownKey, match="secret-"):
        load_registry(connection, without)


def test_one_unreadable_row_hides_no_other(door: Door) -> None:
    """A credential of a kind that only a later version has is left out; the others are loaded."""
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
    """Change a row and sign it, as a later version would."""
    found = schema.metadata.tables[table]
    door.rows(f"UPDATE {table} SET {edit} WHERE {where}")
    with door.engine.begin() as connection:
        row = connection.execute(found.select().where(text(where))).mappings().one()
        mac = row_mac(mac_key(door.keyring[row["mac_key"]]), table, {**row})
        connection.execute(found.update().where(text(where)).values(mac=mac))


def test_a_handshake_uses_the_loaded_registry(door: Door) -> None:
    """The whole path, from the row to the answer."""
    assert isinstance(door.challenge(), Challenged)
