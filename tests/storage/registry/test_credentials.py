"""Credentials as rows: stored secrets, and the conversion to credentials, for every kind."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from receiver.errors import ConfigurationError
from receiver.keyring import Keyring
from receiver.protocol.verification import KINDS
from receiver.protocol.verification.google import GoogleCredential
from receiver.protocol.verification.hmac import HmacCredential
from receiver.protocol.verification.jwt import JwtCredential
from receiver.protocol.verification.mtls import MtlsCredential
from receiver.protocol.verification.oauth import OAuthCredential
from receiver.protocol.verification.sigv4 import SigV4Credential
from receiver.protocol.verification.smart import SmartCredential
from receiver.storage.registry.credentials import CredentialFactory, new_token
from tests.protocol.verification.issuers import P384, RSA_FIRST, RSA_SECOND, jwk, pem
from tests.storage.door import DESTINATION, Door

SECRET = b"a made-up secret of some length"
KEYS = json.dumps({"keys": [jwk(RSA_FIRST, kid="a"), jwk(P384, kid="e")]})
URL = "https://issuer.example/keys"

RIGHT: dict[str, tuple[dict[str, Any], bytes | None, type]] = {
    "hmac": ({"header": "X-Sig", "encoding": "hex"}, SECRET, HmacCredential),
    "jwt": ({"issuers": ["i"], "audiences": ["a"], "keys": KEYS}, None, JwtCredential),
    "google": ({"audiences": ["a"], "email": "a@b.example", "keys": pem(RSA_FIRST).decode()}, None, GoogleCredential),
    "oauth": ({"client_id": "redox", "scopes": ["s"], "names": {"client_id": "clientId"}}, SECRET, OAuthCredential),
    "smart": ({"client_id": "redox", "audiences": ["https://receiver.example/t"], "keys": KEYS}, None, SmartCredential),
    "sigv4": (
        {"access_key": "AKID", "region": "r", "service": "s", "hosts": ["Receiver.example"]},
        SECRET + b"\nsession",
        SigV4Credential,
    ),
    "mtls": ({"proxy": "nginx", "san": "redox.example"}, SECRET, MtlsCredential),
}


def add(door: Door, kind: str, **changes: Any) -> int:
    """Add a valid credential with `changes`."""
    settings, secret, _ = RIGHT[kind]
    values: dict[str, Any] = {"secret": secret, "label": None, "expires_at": None, "fetched": None}
    given = {name: changes.pop(name) for name in values if name in changes}
    return door.registration.add_credential(DESTINATION, door.now, kind, {**settings, **changes}, **values | given)


def of_kind(door: Door, kind: type) -> Any:
    """Return the credential of that type."""
    return next(each for each in door.destination.credentials if isinstance(each, kind))


def test_every_kind_is_tested() -> None:
    """RIGHT has every kind but the verification token, which has its own tests."""
    assert {"token", *RIGHT} == set(KINDS)


def test_a_token_is_long_and_random() -> None:
    """256 random bits, in characters that the dashboard accepts."""
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) == 43 and token.replace("-", "").replace("_", "").isalnum() for token in tokens)


@pytest.mark.parametrize("kind", RIGHT)
def test_a_row_becomes_a_credential(door: Door, kind: str) -> None:
    """The loaded credential has the registered kind, expiry and revocation."""
    ends = door.now + timedelta(days=1)
    number = add(door, kind, expires_at=ends)
    found = of_kind(door, RIGHT[kind][2])
    assert (found.id, found.expires_at, found.revoked) == (number, ends, False)
    door.registration.revoke_credential(number, door.now)
    assert of_kind(door, RIGHT[kind][2]).revoked
    assert door.value("SELECT detail FROM audit_events WHERE action = 'credential.add'") == json.dumps(
        {"kind": kind}, separators=(",", ":")
    )


@pytest.mark.parametrize("kind", ["hmac", "oauth", "sigv4", "mtls"])
def test_no_secret_is_in_the_database(door: Door, kind: str) -> None:
    """A secret is stored encrypted, or as a digest."""
    add(door, kind)
    text = repr(door.rows("SELECT * FROM credentials")) + repr(door.rows("SELECT * FROM audit_events"))
    assert SECRET.decode() not in text
    assert SECRET.hex() not in text


def test_settings_become_fields(door: Door) -> None:
    """Names, times and keys are in the credential's fields."""
    for kind in RIGHT:
        add(door, kind)
    assert of_kind(door, HmacCredential).header == "x-sig"
    assert [key.kid for key in of_kind(door, JwtCredential).rules.keys] == ["a", "e"]
    assert of_kind(door, GoogleCredential).rules.issuers == ("https://accounts.google.com", "accounts.google.com")
    oauth = of_kind(door, OAuthCredential)
    assert (oauth.client.names, oauth.client.scopes) == ({"client_id": "clientId"}, ("s",))
    smart = of_kind(door, SmartCredential)
    assert (smart.rules.issuers, smart.rules.lifetime) == (("redox",), 300)
    assert not smart.rules.other_audiences
    sigv4 = of_kind(door, SigV4Credential)
    assert (sigv4.secret, sigv4.session_token, sigv4.hosts) == (SECRET, b"session", ("receiver.example",))
    assert (of_kind(door, MtlsCredential).secret, of_kind(door, MtlsCredential).san) == (SECRET, "redox.example")


def test_the_newest_active_token_key_signs(door: Door, keyring: Keyring) -> None:
    """The newest active token key signs access tokens; older ones, and pending ones, only verify."""
    add(door, "oauth")
    newer = keyring.with_new("token", datetime.now(UTC))
    row = door.rows("SELECT * FROM credentials WHERE kind = 'oauth'")[0]._asdict()
    credential = CredentialFactory(newer).credential(row, {}, datetime.now(UTC))
    assert isinstance(credential, OAuthCredential)
    assert [key.kid for key in credential.token_keys] == [newer.current("token").id, keyring.current("token").id]
    assert all(key.key not in [each.secret for each in newer.keys] for key in credential.token_keys)
    pending = keyring.with_new("token", datetime.now(UTC), pending=True)
    credential = CredentialFactory(pending).credential(row, {}, datetime.now(UTC))
    assert isinstance(credential, OAuthCredential)
    assert len(credential.token_keys) == 2
    assert credential.token_keys[0].kid == keyring.current("token").id


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("jwt", {"issuers": []}, "issuer"),
        ("jwt", {"audiences": []}, "audience"),
        ("jwt", {"algorithms": ["none"]}, "none"),
        ("jwt", {"algorithms": ["HS256"]}, "HS256"),
        ("jwt", {"keys": "x"}, "neither PEM nor a JWKS"),
        ("jwt", {"jwks_url": URL}, "one of --keys and --jwks-url"),
        ("jwt", {"keys": None}, "one of --keys"),
        ("jwt", {"issuers": ["redox-receiver"]}, "own access tokens"),
        ("jwt", {"lifetime": 0}, "lifetime"),
        ("jwt", {"unknown": 1}, "unknown"),
        ("jwt", {"secret": SECRET}, "no secret"),
        ("google", {"email": None}, "e-mail"),
        ("oauth", {"secret": b"short"}, "24"),
        ("oauth", {"secret": None}, "a secret"),
        ("oauth", {"client_id": ""}, "id"),
        ("oauth", {"lifetime": 7200}, "3600"),
        ("oauth", {"names": {"x": "y"}}, "renamed"),
        ("sigv4", {"region": 7}, "region"),
        ("mtls", {"san": None}, "fingerprint"),
        ("mtls", {"fingerprint": "AA"}, "64 hexadecimal"),
        ("mtls", {"subject": "nonsense"}, "openssl"),
        ("mtls", {"proxy": "apache"}, "apache"),
        ("mtls", {"secret_header": "x y"}, "header"),
        *[
            ("hmac", {"header": name}, f"{name} is a header that every request has")
            for name in (
                "host",
                "content-length",
                "Content-Type",
                "authorization",
                "Verification-Token",
                "accept-encoding",
                "x-forwarded-for",
                "ssl-client-cert",
                "x-amz-date",
            )
        ],
        ("hmac", {"timestamp_header": "date"}, "date is a header"),
        ("hmac", {"timestamp_header": "x-sig"}, "differ"),
        ("mtls", {"secret_header": "Authorization"}, "Authorization is a header"),
        ("sigv4", {"hosts": ["https://receiver.example"]}, "'https://receiver.example' is not a valid host"),
        ("hmac", {"secret": b"short"}, "24"),
        ("hmac", {"hash": "md5"}, "md5"),
    ],
)
def test_invalid_credentials(door: Door, kind: str, changes: dict[str, Any], message: str) -> None:
    """A credential that would accept everybody, or nobody, is refused with an explanation; nothing is written."""
    before = door.rows("SELECT id FROM credentials")
    with pytest.raises(ConfigurationError, match=message):
        add(door, kind, **changes)
    assert door.rows("SELECT id FROM credentials") == before


def test_each_proxy_has_its_own_secret(door: Door) -> None:
    """One secret for two kinds of proxy is refused: either could forge the headers that only the other overwrites."""
    number = add(door, "mtls")
    with pytest.raises(ConfigurationError, match=f"credential {number} "):
        add(door, "mtls", proxy="envoy")
    add(door, "mtls", san="other.example")
    add(door, "mtls", proxy="envoy", secret=SECRET[::-1])
    door.registration.revoke_credential(number, door.now)


class TestKeySets:
    """The stored keys of a URL."""

    def test_they_are_needed_to_register(self, door: Door) -> None:
        """A URL whose keys were never fetched is refused; after they were fetched, it is accepted."""
        with pytest.raises(ConfigurationError, match="never fetched"):
            add(door, "jwt", keys=None, jwks_url=URL)
        add(door, "jwt", keys=None, jwks_url=URL, fetched=KEYS.encode())
        add(door, "jwt", keys=None, jwks_url=URL, issuers=["j"])
        assert [
            [key.kid for key in each.rules.keys]
            for each in door.destination.credentials
            if isinstance(each, JwtCredential)
        ] == [["a", "e"]] * 2

    def test_an_invalid_key_set_is_refused(self, door: Door) -> None:
        """An invalid key set leaves the stored one unchanged."""
        add(door, "jwt", keys=None, jwks_url=URL, fetched=KEYS.encode())
        version = door.value("SELECT version FROM registry_version")
        for garbage in (b"", b"<html>", b'{"keys": []}', b"[" * 100_000):
            with pytest.raises(ConfigurationError):
                door.registration.keys_fetched(URL, garbage, door.now)
        assert door.value("SELECT version FROM registry_version") == version
        assert [key.kid for key in of_kind(door, JwtCredential).rules.keys] == ["a", "e"]

    def test_changed_keys_reach_every_host(self, door: Door) -> None:
        """Changed keys make a new version of the registry and an audit row; unchanged ones make neither."""
        add(door, "jwt", keys=None, jwks_url=URL, fetched=KEYS.encode())
        version = door.value("SELECT version FROM registry_version")
        assert not door.registration.keys_fetched(URL, KEYS.encode(), door.now)
        assert door.value("SELECT version FROM registry_version") == version
        other = json.dumps({"keys": [jwk(RSA_SECOND, kid="b")]}).encode()
        assert door.registration.keys_fetched(URL, other, door.now)
        assert door.value("SELECT version FROM registry_version") == version + 1
        assert [key.kid for key in of_kind(door, JwtCredential).rules.keys] == ["b"]
        detail = door.rows("SELECT detail FROM audit_events WHERE action = 'key_set.change' ORDER BY id")[-1][0]
        assert json.loads(detail) == {"url": URL, "keys": ["b"]}

    def test_a_changed_row_is_not_used(self, door: Door) -> None:
        """Keys that were inserted into the database are not used: the row's MAC fails."""
        add(door, "jwt", keys=None, jwks_url=URL, fetched=KEYS.encode())
        other = json.dumps({"keys": [jwk(RSA_SECOND, kid="b")]}).encode()
        door.rows("UPDATE key_sets SET document = :document", document=other)
        assert of_kind(door, JwtCredential).rules.keys == ()
