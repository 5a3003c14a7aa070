"""Signing keys."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from sqlalchemy import Engine, text

from receiver.errors import ConfigurationError, Conflict, IntegrityError, NotFound
from receiver.keyring import Keyring
from receiver.protocol.api_keys import load_oauth_key
from receiver.protocol.jwk import public_jwk
from receiver.storage.registry import loader
from receiver.storage.registry.signing_keys import SigningKeys, active, rows

NOW = datetime(2026, 1, 31, 8, tzinfo=UTC)


@pytest.fixture
def verbs(engine: Engine, keyring: Keyring) -> SigningKeys:
    return SigningKeys(engine, keyring, actor="tester@test")


def states(engine: Engine) -> dict[str, str]:
    with engine.connect() as connection:
        return {row["kid"]: row["state"] for row in rows(connection)}


def published(engine: Engine, keyring: Keyring) -> list[str]:
    with engine.connect() as connection:
        return [key["kid"] for key in loader.load_registry(connection, keyring).public_keys]


def signing(engine: Engine, keyring: Keyring) -> str:
    with engine.connect() as connection:
        return active(connection, keyring)[0]


def test_a_key_is_made_and_opened(engine: Engine, keyring: Keyring, verbs: SigningKeys) -> None:
    """The first key is active: RSA of 3072 bits, or P-384. Its private half belongs to the published one."""
    for algorithm, kind in (("RS384", RSAPrivateKey), ("ES384", EllipticCurvePrivateKey)):
        verbs.rotate(NOW, algorithm)  # type: ignore[arg-type]  # both are of the type
        with engine.connect() as connection:
            kid, pem = active(connection, keyring)
            public = loader.load_registry(connection, keyring).public_keys[0]
        key = load_oauth_key(pem, client_id="c", kid=kid)

        assert isinstance(key.private_key, kind)
        assert key.private_key.key_size == (3072 if algorithm == "RS384" else 384)
        assert public_jwk(key.private_key) == public
        assert (key.algorithm, public["kid"]) == (algorithm, kid)


def test_the_private_half_is_sealed(engine: Engine, verbs: SigningKeys) -> None:
    """No private key is in the database in plain text, or in a returned value."""
    row = verbs.new(NOW, "RS384")
    with engine.connect() as connection:
        stored = connection.execute(text("SELECT secret FROM signing_keys")).scalar_one()
        dumped = str(connection.execute(text("SELECT * FROM signing_keys")).one())

    assert b"PRIVATE" not in stored
    assert "PRIVATE" not in dumped
    assert not {"secret", "secret_key", "mac"} & row.keys()
    assert not {"d", "p", "q"} & row["public_jwk"].keys()


def test_a_second_key_is_published_until_rotate(engine: Engine, keyring: Keyring, verbs: SigningKeys) -> None:
    """Another key is published and does not sign; rotate activates it, and the previous key stays published."""
    first, second = (verbs.new(NOW, "ES384")["kid"] for _ in range(2))

    assert states(engine) == {first: "active", second: "published"}
    assert published(engine, keyring) == [first, second]
    assert verbs.rotate(NOW, None)["kid"] == second
    assert states(engine) == {first: "published", second: "active"}
    assert signing(engine, keyring) == second


def test_rotate_makes_a_key_if_none_is_waiting(engine: Engine, verbs: SigningKeys) -> None:
    """A key that has signed before is not activated again: a new one of the same algorithm is made."""
    first = verbs.new(NOW, "ES384")["kid"]
    second, third = (verbs.rotate(NOW, None) for _ in range(2))

    assert second["algorithm"] == third["algorithm"] == "ES384"
    assert states(engine) == {first: "published", second["kid"]: "published", third["kid"]: "active"}


def test_retire(engine: Engine, keyring: Keyring, verbs: SigningKeys) -> None:
    """A retired key is not published and its private half is deleted; the active one cannot be retired."""
    first = verbs.new(NOW, "ES384")["kid"]
    with pytest.raises(Conflict, match="rotate"):
        verbs.retire(first, NOW)
    second = verbs.rotate(NOW, None)["kid"]
    verbs.retire(first, NOW)

    assert published(engine, keyring) == [second]
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT secret FROM signing_keys WHERE kid = :kid"), {"kid": first}) is None
    with pytest.raises(Conflict, match="already"):
        verbs.retire(first, NOW)
    with pytest.raises(NotFound, match="signing-key list"):
        verbs.retire("unheard of", NOW)


def test_without_a_key(engine: Engine, keyring: Keyring) -> None:
    """The error names the command that makes a key."""
    with engine.connect() as connection, pytest.raises(ConfigurationError, match="signing-key new"):
        active(connection, keyring)


def test_a_changed_row_neither_signs_nor_is_published(engine: Engine, keyring: Keyring, verbs: SigningKeys) -> None:
    """A replaced public half is not published, and its key is not used."""
    verbs.new(NOW, "ES384")
    with engine.begin() as connection:
        connection.execute(text('UPDATE signing_keys SET public_jwk = public_jwk || \'{"x": "another"}\''))

    assert published(engine, keyring) == []
    with engine.connect() as connection, pytest.raises(IntegrityError, match="audit verify"):
        active(connection, keyring)


def test_every_change_is_audited(engine: Engine, verbs: SigningKeys) -> None:
    """The audit log has actor and key id of each change, and no key."""
    first = verbs.new(NOW, "ES384")["kid"]
    second = verbs.rotate(NOW, None)["kid"]
    verbs.retire(first, NOW)
    with engine.connect() as connection:
        audited: list[Any] = list(
            connection.execute(text("SELECT action, actor, subject, detail FROM audit_events ORDER BY id"))
        )

    assert [row.action for row in audited] == [
        "signing_key.new",
        "signing_key.new",
        "signing_key.rotate",
        "signing_key.retire",
    ]
    assert {row.actor for row in audited} == {"tester@test"}
    assert json.loads(audited[2].detail) == {"kid": second, "before": first}
