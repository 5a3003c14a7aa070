"""Kind `google`: a JWT that Google signs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar

import pytest

from receiver.errors import ConfigurationError
from receiver.protocol.jose import Rules
from receiver.protocol.registry import Credential
from receiver.protocol.verification.google import ALGORITHMS, ISSUERS, GoogleCredential
from tests.protocol.made_up import NOW, TOKENS, Which, destination, token
from tests.protocol.verification.cases import Headers, VerificationCases, refusal, verify
from tests.protocol.verification.issuers import RSA_FIRST, RSA_SECOND, Issuer, jwks

_AUDIENCE = "https://receiver.example/redox/main"
_EMAIL = "redox@project.iam.gserviceaccount.example"
_AT = int(NOW.timestamp())
_KEYS = {"first": jwks(a=RSA_FIRST), "second": jwks(b=RSA_SECOND)}
_ISSUERS: Mapping[Which, Issuer] = {
    "first": Issuer(key=RSA_FIRST, algorithm="RS256", kid="a"),
    "second": Issuer(key=RSA_SECOND, algorithm="RS256", kid="b"),
}


def _token(which: Which = "first", **changes: Any) -> str:
    claims = {
        "iss": ISSUERS[0],
        "aud": _AUDIENCE,
        "sub": "1093",
        "email": _EMAIL,
        "email_verified": True,
        "iat": _AT - 10,
        "exp": _AT + 3590,
        **changes,
    }
    return _ISSUERS[which].token({name: value for name, value in claims.items() if value is not None})


def _bearer(text: str) -> Headers:
    return {"authorization": f"Bearer {text}"}


def _row(which: Which = "first", **changes: Any) -> GoogleCredential:
    rules = Rules(
        issuers=ISSUERS, audiences=(_AUDIENCE,), algorithms=frozenset(ALGORITHMS), keys=_KEYS[which], lifetime=3600
    )
    return GoogleCredential(**{"id": 1, "rules": rules, "email": _EMAIL, **changes})


_TOKENS: Mapping[Which, str] = {"first": _token("first"), "second": _token("second")}


class TestGoogle(VerificationCases):
    """A token that Google signs."""

    kind = "google"
    claims_unrequired = False
    right: ClassVar[Mapping[Which, Headers]] = {which: _bearer(text) for which, text in _TOKENS.items()}
    bad: ClassVar[Mapping[str, tuple[Headers, str]]] = {
        "another account": (_bearer(_token(email="stranger@example.com")), "jwt_email_wrong"),
        "no e-mail": (_bearer(_token(email=None)), "jwt_email_wrong"),
        "e-mail not verified": (_bearer(_token(email_verified=False)), "jwt_email_wrong"),
        "e-mail verified, it says in words": (_bearer(_token(email_verified="true")), "jwt_email_wrong"),
        "e-mail of another case": (_bearer(_token(email=_EMAIL.upper())), "jwt_email_wrong"),
        "another audience": (_bearer(_token(aud="https://elsewhere.example")), "jwt_audience_wrong"),
        "another issuer": (_bearer(_token(iss="https://accounts.google.com.evil.example")), "jwt_issuer_wrong"),
        "too long": (_bearer(_token(exp=_AT + 3591)), "jwt_lives_too_long"),
        "unknown key": (_bearer(_token("second")), "jwt_key_unknown"),
    }
    expired = "jwt_credential_expired"
    revoked = "jwt_credential_expired"
    unknown = "jwt_credential_missing"
    companion: ClassVar[tuple[str, Credential, Headers]] = (
        "token",
        token(id=9),
        {"verification-token": TOKENS["first"]},
    )

    def credential(
        self,
        which: Which = "first",
        *,
        id: int = 1,  # noqa: A002
        expires_at: datetime | None = None,
        revoked: bool = False,
    ) -> Credential:
        """The credential of an account."""
        return _row(which, id=id, expires_at=expires_at, revoked=revoked)

    def presenting(self, value: str) -> Headers:
        """As a Bearer value."""
        return _bearer(value)

    def secrets(self) -> list[str]:
        """The tokens."""
        return [*_TOKENS.values()]


def test_by_subject() -> None:
    """An account may be pinned by its number, with or without its e-mail address."""
    at = destination(_row(email=None, subject="1093"), require=("google",))
    assert verify(_bearer(_token(email=None)), at).credentials == (1,)
    assert refusal(_bearer(_token(sub="1094")), at) == "jwt_subject_wrong"
    both = destination(_row(subject="1093"), require=("google",))
    assert verify(_bearer(_token()), both).credentials == (1,)
    assert refusal(_bearer(_token(sub="1094")), both) == "jwt_subject_wrong"
    assert refusal(_bearer(_token(email="x@example.com")), both) == "jwt_email_wrong"


def test_either_spelling_of_the_issuer() -> None:
    """Google writes its issuer with and without https."""
    at = destination(_row(), require=("google",))
    for issuer in ISSUERS:
        assert verify(_bearer(_token(iss=issuer)), at).credentials == (1,)


@pytest.mark.parametrize("pins", [{"email": None}, {"email": ""}, {"email": None, "subject": ""}])
def test_an_account_is_required(pins: dict[str, Any]) -> None:
    """A credential without an account would accept everybody with a Google account: it is refused."""
    with pytest.raises(ConfigurationError, match="e-mail"):
        _row(**pins)
