"""The description of each kind: options, settings and secret, without a database or a command line."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from receiver.errors import ConfigurationError
from receiver.protocol.jose import VerifyingKey
from receiver.protocol.registry import Credential
from receiver.protocol.verification import KINDS
from receiver.protocol.verification.kind import CredentialKind, OtherCredential, SecretStorage, StoredCredential
from receiver.protocol.verification.public_keys import MAX_STALE
from tests.protocol.verification.issuers import RSA_FIRST, jwks, pem

SECRET = b"a made-up secret of some length"
KEYS = pem(RSA_FIRST).decode()
URL = "https://issuer.example/keys"
FINGERPRINT = "AA:" * 31 + "AA"

# Kind → options as the command line passes them, and the settings that are stored.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "token": ({}, {}),
    "hmac": (
        {"header": "X-Sig", "timestamp_header": "X-Time", "tolerance": 60},
        {"header": "x-sig", "timestamp_header": "x-time", "tolerance": 60},
    ),
    "jwt": (
        {"issuer": ("i", "j"), "audience": ("us",), "keys": KEYS, "algorithm": ("RS256",)},
        {"issuers": ["i", "j"], "audiences": ["us"], "keys": KEYS, "algorithms": ["RS256"]},
    ),
    "oauth": (
        {"client_id": "redox", "audience": ("us",), "scope": ("a", "b"), "parameter": ("client_id=clientId",)},
        {"client_id": "redox", "audience": "us", "scopes": ["a", "b"], "names": {"client_id": "clientId"}},
    ),
    "smart": (
        {"client_id": "redox", "token_url": (URL,), "keys": KEYS, "other_audiences": True},
        {
            "client_id": "redox",
            "audiences": [URL],
            "keys": KEYS,
            "other_audiences": True,
            "algorithms": ["RS384", "ES384"],
        },
    ),
    "sigv4": (
        {"access_key": "AKID", "region": "r", "service": "s", "host": ("Receiver.example",)},
        {"access_key": "AKID", "region": "r", "service": "s", "hosts": ["receiver.example"]},
    ),
    "google": (
        {"audience": ("us",), "email": "a@b.example"},
        {
            "audiences": ["us"],
            "email": "a@b.example",
            "jwks_url": "https://www.googleapis.com/oauth2/v3/certs",
            "issuers": ["https://accounts.google.com", "accounts.google.com"],
            "algorithms": ["RS256"],
        },
    ),
    "mtls": (
        {"proxy": "nginx", "fingerprint": FINGERPRINT, "subject": "CN=a"},
        {"proxy": "nginx", "fingerprint": "aa" * 32, "subject": "CN=a"},
    ),
}


def resolve(kind: CredentialKind[Any, Any], settings: dict[str, Any]) -> Any:
    """Return the settings as stored, and as read again."""
    normal = msgspec.to_builtins(kind.normalize(msgspec.convert(settings, kind.settings)))
    return normal, msgspec.convert(normal, kind.settings)


def made(name: str, **changes: Any) -> Credential:
    """Return a credential of that kind; `changes`: to the settings."""
    kind = KINDS[name]
    _, read = resolve(kind, kind.from_options(OPTIONS[name][0]) | changes)
    credential: Credential = kind.make(read, StoredCredential(id=7, secret=SECRET))
    return credential


@pytest.mark.parametrize("name", KINDS)
def test_options_become_settings(name: str) -> None:
    """Each option becomes a setting in its normal form; defaults are not stored, and the normal form is stable."""
    kind, (given, stored) = KINDS[name], OPTIONS[name]
    assert resolve(kind, kind.from_options(given))[0] == stored
    assert resolve(kind, stored)[0] == stored


@pytest.mark.parametrize("name", KINDS)
def test_a_credential_is_made(name: str) -> None:
    """It has the kind's type and the fields of every credential, and its repr does not show the secret."""
    credential = made(name)
    assert type(credential) is KINDS[name].credential
    assert (credential.id, credential.expires_at, credential.revoked) == (7, None, False)
    assert SECRET.decode() not in repr(credential)


@pytest.mark.parametrize("name", KINDS)
def test_a_secret_that_could_be_guessed(name: str) -> None:
    """A kind has a secret of at least 24 characters, or none."""
    kind = KINDS[name]
    right: bytes | None = None if kind.secret is SecretStorage.NONE else SECRET
    kind.check_secret(right)
    for wrong in [SECRET] if right is None else [None, b"short", b"short\n" + SECRET]:
        with pytest.raises(ConfigurationError):
            kind.check_secret(wrong)


@pytest.mark.parametrize("token", [b"x" * 23, b" " + SECRET, SECRET + b"\n", SECRET + b"\xff", SECRET + b"\x00"])
def test_a_token_that_is_not_valid_in_a_header(token: bytes) -> None:
    """A verification token is printable ASCII without space around it."""
    with pytest.raises(ConfigurationError, match="printable ASCII"):
        KINDS["token"].check_secret(token)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hmac", {"header": "x y"}, "letters, digits"),
        ("hmac", {"header": "Host"}, "Host is a header"),
        ("hmac", {"header": "x-time"}, "must differ"),
        ("jwt", {"issuers": ["redox-receiver"]}, "own access tokens"),
        ("jwt", {"algorithms": ["none"]}, "none"),
        ("jwt", {"jwks_url": URL}, "one of --keys and --jwks-url"),
        ("jwt", {"max_stale": 60}, "--max-stale"),
        ("google", {"email": None}, "e-mail"),
        ("oauth", {"names": {"x": "y"}}, "may be renamed"),
        ("oauth", {"lifetime": 7200}, "3600"),
        ("oauth", {"client_id": ""}, "client id"),
        ("sigv4", {"hosts": ["a b"]}, "not a valid host"),
        ("mtls", {"fingerprint": "AA"}, "64 hexadecimal"),
        ("mtls", {"subject": "nonsense"}, "openssl"),
        ("mtls", {"fingerprint": None, "subject": None}, "fingerprint"),
    ],
)
def test_invalid_settings(name: str, changes: dict[str, Any], message: str) -> None:
    """Settings that would accept every request, or none, are refused; the error names the setting."""
    with pytest.raises(ConfigurationError, match=message):
        made(name, **changes)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("oauth", {"audience": ("a", "b")}, "only one --audience"),
        ("oauth", {"parameter": ("x",)}, "NAME=SENT"),
        ("oauth", {"parameter": ("x=",)}, "NAME=SENT"),
    ],
)
def test_invalid_options(name: str, given: dict[str, Any], message: str) -> None:
    """An option that is given too often, or in another form, is refused."""
    with pytest.raises(ConfigurationError, match=message):
        KINDS[name].from_options(given)


@pytest.mark.parametrize("name", ["jwt", "google", "smart"])
def test_keys_of_a_url(name: str) -> None:
    """Keys come from the key set: none before it is fetched; the credential is stale if they are too old."""
    kind = KINDS[name]
    _, read = resolve(kind, kind.from_options(OPTIONS[name][0]) | {"jwks_url": URL, "keys": None})
    assert kind.make(read, StoredCredential(id=1)).rules.keys == ()
    asked: list[tuple[str, int]] = []

    def key_set(url: str, seconds: int) -> tuple[tuple[VerifyingKey, ...], bool]:
        asked.append((url, seconds))
        return jwks(a=RSA_FIRST), True

    credential = kind.make(read, StoredCredential(id=1, key_set=key_set))
    assert asked == [(URL, MAX_STALE)]
    assert [key.kid for key in credential.rules.keys] == ["a"]
    assert credential.stale
    assert not made("token").stale


def test_one_secret_for_two_proxies() -> None:
    """One secret for two kinds of proxy is refused: either could forge the headers that only the other overwrites."""
    mtls = KINDS["mtls"]
    _, read = resolve(mtls, OPTIONS["mtls"][1])
    assert [each.name for each in KINDS.values() if each.compares_others] == ["mtls"]
    mtls.check_others(
        read,
        SECRET,
        [
            OtherCredential(id=1, settings={"proxy": "nginx"}, secret=SECRET),
            OtherCredential(id=2, settings={"proxy": "envoy"}, secret=SECRET[::-1]),
        ],
    )
    with pytest.raises(ConfigurationError, match="credential 3 "):
        mtls.check_others(read, SECRET, [OtherCredential(id=3, settings={"proxy": "envoy"}, secret=SECRET)])


def test_the_second_line_of_a_secret() -> None:
    """AWS's session token is on it."""
    kind = KINDS["sigv4"]
    _, read = resolve(kind, OPTIONS["sigv4"][1])
    credential = kind.make(read, StoredCredential(id=1, secret=SECRET + b"\nsession"))
    assert (credential.secret, credential.session_token) == (SECRET, b"session")
    assert getattr(credential, kind.second_secret or "") == b"session"
