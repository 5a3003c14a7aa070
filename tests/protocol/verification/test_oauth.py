"""Kinds `oauth` and `smart`: access tokens that this receiver's token endpoint issues."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from hashlib import sha256
from hmac import digest
from typing import Any, ClassVar

import pytest

from receiver.protocol.jose import Rules, VerifyingKey
from receiver.protocol.registry import Credential
from receiver.protocol.verification.oauth import AccessTokenCredential, Client, OAuthCredential, issue
from receiver.protocol.verification.smart import SmartCredential
from tests.protocol.made_up import NOW, TOKENS, Which, destination, token
from tests.protocol.verification.cases import Headers, VerificationCases, refusal, verify
from tests.protocol.verification.issuers import P384, b64, jwks

_AT = int(NOW.timestamp())
_SECRET = b"a made-up key for access tokens."
_KEYS = (VerifyingKey(kid="token-1", algorithms=frozenset({"HS256"}), key=_SECRET),)
_OTHER_KEYS = (VerifyingKey(kid="token-1", algorithms=frozenset({"HS256"}), key=_SECRET[::-1]),)


def _signed(claims: Mapping[str, Any], header: Mapping[str, Any] | None = None, key: bytes = _SECRET) -> str:
    """Make a token by hand: RFC 7515, 7518 3.2."""
    members = {"alg": "HS256", "typ": "at+jwt", "kid": "token-1", **(header or {})}
    parts = [
        b64(json.dumps({name: value for name, value in each.items() if value is not None}).encode())
        for each in (members, claims)
    ]
    return ".".join([*parts, b64(digest(key, ".".join(parts).encode(), "sha256"))])


def _token(subject: str, header: Mapping[str, Any] | None = None, key: bytes = _SECRET, **changes: Any) -> str:
    claims = {
        "iss": "redox-receiver",
        "aud": "redox-receiver:destination:1",
        "sub": subject,
        "client_id": "redox",
        "iat": _AT - 10,
        "exp": _AT + 290,
        "jti": "1",
        **changes,
    }
    return _signed(claims, header, key)


def _bearer(text: str) -> Headers:
    return {"authorization": f"Bearer {text}"}


class _AccessTokenCases(VerificationCases):
    """The cases of both kinds."""

    claims_unrequired = False
    expired = "jwt_credential_expired"
    revoked = "jwt_credential_expired"
    unknown = "jwt_credential_missing"
    companion: ClassVar[tuple[str, Credential, Headers]] = (
        "token",
        token(id=9),
        {"verification-token": TOKENS["first"]},
    )

    def presenting(self, value: str) -> Headers:
        """As a Bearer value."""
        return _bearer(value)

    def secrets(self) -> list[str]:
        """The key, and the presented tokens."""
        return [_SECRET.decode(), _SECRET.hex(), self.right["first"]["authorization"][7:]]

    def test_right(self) -> None:
        """A token is accepted for the credential that requested it."""
        verified = verify(self.right["first"], self.at(self.credential(id=1), self.credential("second", id=2)))
        assert verified.credentials == (1,)
        assert verified.kinds == {self.kind}

    def test_another_issuer(self) -> None:
        """A token of an unknown issuer is refused."""
        presented = _bearer(_token("oauth:1", iss="https://somebody.example"))
        assert refusal(presented, self.at(self.credential())).startswith("jwt_")

    def test_the_same_secret_twice(self) -> None:
        """A token ends with its credential: the same client, registered again, has to request a new one."""
        for pair in (
            (self.credential(id=1, revoked=True), self.credential(id=2)),
            (self.credential(id=2), self.credential(id=1, revoked=True)),
        ):
            assert refusal(self.right["first"], self.at(*pair)) == self.revoked

    def test_an_issued_token_is_accepted(self) -> None:
        """A token of `issue` is accepted until it expires, at its destination only."""
        credential = self.credential(id=3)
        assert isinstance(credential, AccessTokenCredential)
        at = self.at(credential)
        made = _bearer(issue(credential, at, NOW, scopes=("a", "b"), jti="x"))
        assert verify(made, at).credentials == (3,)
        end = NOW.replace(microsecond=0) + timedelta(seconds=credential.client.lifetime)
        assert verify(made, at, now=end - timedelta(microseconds=1)).credentials == (3,)
        assert refusal(made, at, now=end) == "jwt_expired"
        elsewhere = destination(credential, require=(self.kind,), id=2, name="other")
        assert refusal(made, elsewhere) == "jwt_audience_wrong"

    def test_a_token_of_the_other_kind(self) -> None:
        """A token of the other kind is refused if only this kind is required."""
        other = {"oauth": "smart", "smart": "oauth"}[self.kind]
        at = self.at(self.credential(id=1))
        assert refusal(_bearer(_token(f"{other}:1")), at) == "credential_missing"

    def test_keys_rotate(self) -> None:
        """Tokens are accepted while their key is kept; the newest key signs."""
        new = VerifyingKey(kid="token-2", algorithms=frozenset({"HS256"}), key=sha256(b"another").digest())
        rotated = self.made(1, (new, *_KEYS))
        at = self.at(rotated)
        assert verify(self.right["first"], at).credentials == (1,)
        assert verify(_bearer(issue(rotated, at, NOW, scopes=(), jti="x")), at).credentials == (1,)
        assert refusal(self.right["first"], self.at(self.made(1, (new,)))) == "jwt_key_unknown"
        assert refusal(self.right["first"], self.at(self.made(1, _OTHER_KEYS))) == "jwt_signature_wrong"

    def made(self, id: int, keys: tuple[VerifyingKey, ...], **values: Any) -> AccessTokenCredential:  # noqa: A002
        """Return the credential, with those keys (`id` is the field's name)."""
        raise NotImplementedError

    def credential(
        self,
        which: Which = "first",
        *,
        id: int = 1,  # noqa: A002
        expires_at: datetime | None = None,
        revoked: bool = False,
    ) -> Credential:
        """The first client's credential, or the second's."""
        return self.made(id, _KEYS, expires_at=expires_at, revoked=revoked)


def _bad(kind: str) -> Mapping[str, tuple[Headers, str]]:
    good = _token(f"{kind}:1")
    return {
        "another key": (_bearer(_token(f"{kind}:1", key=_SECRET[::-1])), "jwt_signature_wrong"),
        "empty key": (_bearer(_token(f"{kind}:1", key=b"")), "jwt_signature_wrong"),
        "alg none": (_bearer(_token(f"{kind}:1", {"alg": "none"})), "jwt_algorithm_wrong"),
        "alg HS512": (_bearer(_token(f"{kind}:1", {"alg": "HS512"})), "jwt_algorithm_wrong"),
        "unknown kid": (_bearer(_token(f"{kind}:1", {"kid": "token-9"})), "jwt_key_unknown"),
        "typ JWT": (_bearer(_token(f"{kind}:1", {"typ": "JWT"})), "jwt_type_wrong"),
        "no typ": (_bearer(_token(f"{kind}:1", {"typ": None})), "jwt_type_wrong"),
        "another destination": (_bearer(_token(f"{kind}:1", aud="redox-receiver:destination:2")), "jwt_audience_wrong"),
        "another row": (_bearer(_token(f"{kind}:8")), "jwt_credential_missing"),
        "a row of zeros": (_bearer(_token(f"{kind}:01")), "jwt_credential_missing"),
        "no row": (_bearer(_token(f"{kind}:")), "jwt_credential_missing"),
        "expired": (_bearer(_token(f"{kind}:1", exp=_AT)), "jwt_expired"),
        "from the future": (_bearer(_token(f"{kind}:1", iat=_AT + 31)), "jwt_not_yet_valid"),
        "for ever": (_bearer(_token(f"{kind}:1", exp=10**30)), "jwt_malformed"),
        "for a day": (_bearer(_token(f"{kind}:1", exp=_AT + 86_400)), "jwt_lives_too_long"),
        "no exp": (_bearer(_signed({"iss": "redox-receiver", "sub": f"{kind}:1", "iat": _AT})), "jwt_claim_missing"),
        "crit": (_bearer(_token(f"{kind}:1", {"crit": ["exp"]})), "jwt_header_refused"),
        "cut": (_bearer(good[:-1]), "jwt_malformed"),
        "of the second row": (_bearer(_token(f"{kind}:2")), "jwt_credential_missing"),
    }


class TestOAuth(_AccessTokenCases):
    """Issued for a client secret."""

    kind = "oauth"
    right: ClassVar[Mapping[Which, Headers]] = {
        "first": _bearer(_token("oauth:1")),
        "second": _bearer(_token("oauth:2")),
    }
    bad: ClassVar[Mapping[str, tuple[Headers, str]]] = _bad("oauth")

    def made(self, id: int, keys: tuple[VerifyingKey, ...], **values: Any) -> AccessTokenCredential:  # noqa: A002
        """A client with a secret."""
        return OAuthCredential(
            id=id, client=Client(client_id="redox"), digest=b"d" * 32, key=b"k" * 32, token_keys=keys, **values
        )


class TestSmart(_AccessTokenCases):
    """Issued for a signed assertion."""

    kind = "smart"
    right: ClassVar[Mapping[Which, Headers]] = {
        "first": _bearer(_token("smart:1")),
        "second": _bearer(_token("smart:2")),
    }
    bad: ClassVar[Mapping[str, tuple[Headers, str]]] = _bad("smart")

    def made(self, id: int, keys: tuple[VerifyingKey, ...], **values: Any) -> AccessTokenCredential:  # noqa: A002
        """A client with a key set."""
        rules = Rules(
            issuers=("redox",),
            audiences=("https://receiver.example/oauth/main/token",),
            keys=jwks(e=P384),
            algorithms=frozenset({"ES384"}),
            lifetime=300,
        )
        return SmartCredential(id=id, client=Client(client_id="redox"), rules=rules, token_keys=keys, **values)


@pytest.mark.parametrize("subject", ["oauth:1", "smart:1", None, 7, "token:1"])
def test_a_forged_token_of_this_receiver(subject: object) -> None:
    """A token with this receiver's issuer that it did not issue is refused, whatever kinds are required."""
    claims = {
        "iss": "redox-receiver",
        "aud": "redox-receiver:destination:1",
        "sub": subject,
        "iat": _AT,
        "exp": _AT + 9,
    }
    at = destination(require=("jwt", "google", "oauth", "smart"))
    assert refusal(_bearer(_signed(claims, key=b"x" * 32)), at) == "jwt_credential_missing"
