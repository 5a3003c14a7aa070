"""Registered API keys."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sqlalchemy import Engine, text

from receiver.errors import ConfigurationError, Conflict, IntegrityError, NotFound
from receiver.keyring import Keyring
from receiver.protocol.api_keys import LegacyKey, OAuthKey
from receiver.storage.registry import api_keys
from receiver.storage.registry.api_keys import ApiEndpoint, ApiKeys, OAuthKeySpec
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.signing_keys import SigningKeys

NOW = datetime(2026, 1, 31, 8, tzinfo=UTC)
OURS = OAuthKeySpec(client_id="client-1")
LEGACY = LegacyKey(api_key="canary-api-key", secret="canary-secret")
PEM = ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def where(environment: str = "development", **changes: Any) -> ApiEndpoint:
    return ApiEndpoint(
        **{"environment": environment, "base_url": "https://api.redoxengine.com", "source_id": None} | changes
    )


@pytest.fixture
def verbs(engine: Engine, keyring: Keyring) -> ApiKeys:
    return ApiKeys(engine, keyring, actor="tester@test")


def stored(engine: Engine, keyring: Keyring, name: str) -> tuple[api_keys.StoredKey, Any]:
    with engine.connect() as connection:
        return api_keys.load_api_keys(connection, keyring, name), api_keys.open_key(connection, keyring, name)


def test_a_key_with_its_own_private_key(engine: Engine, keyring: Keyring, verbs: ApiKeys) -> None:
    """An OAuth key with its own private key opens with that key and its kid."""
    verbs.add_api_key(
        "lab",
        where(source_id="s-1"),
        OAuthKeySpec(client_id="client-1", private_key=PEM, kid="kid-1", scope="a b"),
        NOW,
    )
    known, key = stored(engine, keyring, "lab")

    assert (known.legacy, known.source_id, known.several) == (False, "s-1", False)
    assert isinstance(key, OAuthKey)
    assert (key.client_id, key.kid, key.scope) == ("client-1", "kid-1", "a b")
    assert key.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) == PEM


def test_a_key_that_signs_with_the_signing_key(engine: Engine, keyring: Keyring, verbs: ApiKeys) -> None:
    """Without its own private key, it signs with the active signing key, also after a rotation."""
    verbs.add_api_key("lab", where(), OURS, NOW)
    with pytest.raises(ConfigurationError, match="signing-key new"):
        stored(engine, keyring, "lab")
    signing = SigningKeys(engine, keyring, actor="tester@test")

    first = signing.new(NOW, "ES384")["kid"]
    assert stored(engine, keyring, "lab")[1].kid == first
    second = signing.rotate(NOW, None)["kid"]
    assert stored(engine, keyring, "lab")[1].kid == second


def test_a_legacy_key(engine: Engine, keyring: Keyring, verbs: ApiKeys) -> None:
    """A legacy key and its secret are stored encrypted, and open unchanged."""
    verbs.add_api_key("old", where(), LEGACY, NOW)

    assert stored(engine, keyring, "old")[1] == LEGACY
    with engine.connect() as connection:
        everything = [
            str(row)
            for table in ("api_keys", "audit_events")
            for row in connection.execute(text(f"SELECT * FROM {table}"))
        ]
        everything.append(str(api_keys.rows(connection)))
    assert "canary" not in "".join(everything)


@pytest.mark.parametrize(
    ("name", "key", "says"),
    [
        ("Lab", OURS, "not a valid API key name"),
        ("lab", OAuthKeySpec(client_id=""), "client id"),
        ("lab", OAuthKeySpec(client_id="c", private_key=b"canary"), "can't be read"),
        ("lab", OAuthKeySpec(client_id="c", private_key=PEM), "kid"),
    ],
)
def test_an_invalid_key_is_refused(engine: Engine, verbs: ApiKeys, name: str, key: OAuthKeySpec, says: str) -> None:
    """A key is checked when it is added; the error explains the problem and does not quote the key."""
    with pytest.raises(ConfigurationError, match=says) as caught:
        verbs.add_api_key(name, where(), key, NOW)

    assert "canary" not in str(caught.value)
    with engine.connect() as connection:
        assert api_keys.rows(connection) == []


def test_replace(engine: Engine, keyring: Keyring, verbs: ApiKeys) -> None:
    """A name is unique; --replace replaces the key, which changes its version."""
    verbs.add_api_key("lab", where(), LEGACY, NOW)
    before = stored(engine, keyring, "lab")[0]
    with pytest.raises(Conflict, match="--replace"):
        verbs.add_api_key("lab", where(), LEGACY, NOW)
    verbs.add_api_key("lab", where(), OAuthKeySpec(client_id="c", private_key=PEM, kid="k"), NOW, replace=True)
    known, key = stored(engine, keyring, "lab")

    assert (known.legacy, key.kid) == (False, "k")
    assert known.version != before.version
    with pytest.raises(NotFound, match="omit --replace"):
        verbs.add_api_key("other", where(), LEGACY, NOW, replace=True)


def test_several_keys_of_one_environment(engine: Engine, keyring: Keyring, verbs: ApiKeys) -> None:
    """With several OAuth keys in one environment, Redox requires each message's source; legacy keys have one source."""
    for name, place, key in (
        ("a", where(), OURS),
        ("b", where("production"), OURS),
        ("c", where(), LEGACY),
        ("d", where(base_url="https://api.ca.redoxengine.com"), OURS),
    ):
        verbs.add_api_key(name, place, key, NOW)
    SigningKeys(engine, keyring, actor="tester@test").new(NOW, "ES384")
    assert [stored(engine, keyring, name)[0].several for name in "abcd"] == [False] * 4
    verbs.add_api_key("e", where(), OURS, NOW)

    assert [stored(engine, keyring, name)[0].several for name in "abcde"] == [True, False, False, False, True]


def test_a_changed_row_is_not_used(engine: Engine, keyring: Keyring, verbs: ApiKeys) -> None:
    """A key whose base URL was changed in the database is not used."""
    verbs.add_api_key("lab", where(), LEGACY, NOW)
    with engine.begin() as connection:
        connection.execute(text("UPDATE api_keys SET base_url = 'https://elsewhere.invalid'"))

    with pytest.raises(IntegrityError, match="audit verify"):
        stored(engine, keyring, "lab")
    with pytest.raises(IntegrityError):
        verbs.add_api_key("lab", where(), LEGACY, NOW, replace=True)


def test_a_secret_is_bound_to_its_name(engine: Engine, keyring: Keyring, verbs: ApiKeys) -> None:
    """An encrypted secret that was moved to another key's row does not open."""
    for name in ("a", "b"):
        verbs.add_api_key(name, where(), LEGACY, NOW)
    with engine.begin() as connection:
        connection.execute(text("UPDATE api_keys SET secret = (SELECT secret FROM api_keys WHERE name = 'a')"))

    with pytest.raises(IntegrityError):
        stored(engine, keyring, "b")


def test_the_key_that_a_destination_replies_with(
    engine: Engine, keyring: Keyring, verbs: ApiKeys, registration: RegistryChanges
) -> None:
    """It must exist and have the destination's environment; the error names the command that sets it."""
    verbs.add_api_key("dev", where(), LEGACY, NOW)
    verbs.add_api_key("prod", where("production"), LEGACY, NOW)
    registration.add_destination(
        "clinic",
        NOW,
        environment="production",
        require=["token"],
        reply_with=None,
        sources_policy="any",
        on_unknown_source="reject",
        test_messages="accept",
        token="a token that only tests know",
    )
    with engine.connect() as connection, pytest.raises(ConfigurationError, match="--reply-with"):
        api_keys.of_destination(connection, keyring, "clinic")
    with pytest.raises(NotFound, match="outbound key list"):
        registration.set_destination("clinic", NOW, {"reply_with": "unheard-of"})
    with pytest.raises(ConfigurationError, match="development"):
        registration.set_destination("clinic", NOW, {"reply_with": "dev"})
    registration.set_destination("clinic", NOW, {"reply_with": "prod"})

    with engine.connect() as connection:
        assert api_keys.of_destination(connection, keyring, "clinic") == "prod"
    with pytest.raises(Conflict, match="clinic"):
        verbs.add_api_key("prod", where(), LEGACY, NOW, replace=True)
    with pytest.raises(ConfigurationError, match="production"):
        registration.set_destination("clinic", NOW, {"environment": "development"})


def test_the_only_one(engine: Engine, verbs: ApiKeys) -> None:
    """A single key does not have to be named."""
    with engine.connect() as connection:
        with pytest.raises(ConfigurationError, match="outbound key add"):
            api_keys.only_one(connection)
        verbs.add_api_key("a", where(), LEGACY, NOW)
        assert api_keys.only_one(connection) == "a"
        verbs.add_api_key("b", where(), LEGACY, NOW)
        with pytest.raises(ConfigurationError, match=r"a, b.*--key"):
            api_keys.only_one(connection)


def test_every_change_is_audited(engine: Engine, verbs: ApiKeys) -> None:
    """The audit log has the actor and the key."""
    verbs.add_api_key("lab", where(source_id="s"), OURS, NOW)
    with engine.connect() as connection:
        row = connection.execute(text("SELECT action, actor, detail FROM audit_events")).one()

    assert (row.action, row.actor) == ("api_key.add", "tester@test")
    assert json.loads(row.detail) == {
        "name": "lab",
        "environment": "development",
        "kind": "oauth",
        "client_id": "client-1",
        "base_url": "https://api.redoxengine.com",
        "source_id": "s",
    }
