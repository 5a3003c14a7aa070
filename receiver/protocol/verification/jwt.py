"""Kind `jwt`: a signed token with every request, from an issuer whose public keys we hold.

Redox: JWT bearer. Which claims, algorithm and keys Redox's own tokens have is not published: all are settings.

May not fetch a key, whatever a token names; nor take a token that lives longer than the credential allows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Final, TypeVar

import msgspec

from receiver.errors import ConfigurationError, Unavailable, Unverified
from receiver.protocol import jose
from receiver.protocol.jose import Rules
from receiver.protocol.message import Head
from receiver.protocol.registry import Destination, live
from receiver.protocol.verification import bearer
from receiver.protocol.verification.bearer import IssuedCredential
from receiver.protocol.verification.kind import HOUR, HeadKind, Option, Seconds, Stored, Takes
from receiver.protocol.verification.public_keys import (
    AUDIENCE,
    LIFETIME,
    OPTIONS,
    REASONS,
    SUBJECT,
    KeySettings,
    algorithms,
    find_keys,
)

ISSUER: Final = Option(name="issuer", help="who signs (iss); may be repeated.", multiple=True)


# Of several credentials that a token does not satisfy, the one that it came furthest with is told to the operator.
_PROGRESS: Final = (
    "jwt_malformed",
    "jwt_header_refused",
    "jwt_algorithm_wrong",
    "jwt_key_unknown",
    "jwt_signature_wrong",
    "jwt_claim_missing",
    "jwt_issuer_wrong",
    "jwt_audience_wrong",
    "jwt_expired",
    "jwt_not_yet_valid",
    "jwt_lives_too_long",
)

ALGORITHMS: Final = ("RS256", "RS384", "ES256", "ES384")


@dataclass(frozen=True, kw_only=True, slots=True)
class JwtCredential(IssuedCredential):
    """Signed tokens that Redox presents, and what they must be. `subject` None: any that the issuer signs for us."""

    kind: ClassVar[str] = "jwt"
    subject: str | None = None


class JwtSettings(KeySettings, kw_only=True):
    """Those of JwtCredential and of Rules."""

    issuers: list[str]
    audiences: list[str]
    algorithms: list[str] = msgspec.field(default_factory=lambda: list(ALGORITHMS))
    lifetime: Seconds = HOUR
    subject: str | None = None

    def rules(self, stored: Stored) -> Rules:
        """What a token must be. Raises ConfigurationError."""
        if bearer.OURS in self.issuers:
            raise ConfigurationError(f"{bearer.OURS} is the issuer of our own access tokens")
        keys, stale = find_keys(self, stored)
        return Rules(
            issuers=tuple(self.issuers),
            audiences=tuple(self.audiences),
            keys=keys,
            stale=stale,
            algorithms=algorithms(self.algorithms),
            lifetime=self.lifetime,
            leeway=self.leeway,
        )


_Settings = TypeVar("_Settings", bound=JwtSettings)
_Issued = TypeVar("_Issued", bound=IssuedCredential)


class IssuedTokenKind(HeadKind[_Settings, _Issued]):
    """A kind whose tokens an issuer signs that we know: `check` looks at the claims once they are proved."""

    reasons: ClassVar[Mapping[str, str]] = REASONS | {
        "jwt_credential_missing": "there is no credential of the token's kind",
        "jwt_credential_expired": "the credential of the token's kind has expired or was revoked",
        "jwt_subject_wrong": "the token is about another subject than the credential names",
    }

    @abstractmethod
    def check(self, claims: Mapping[str, Any], credential: _Issued) -> None:
        """Raise Unverified for claims that prove somebody else."""

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - Kind's
        """See `bearer.claims`."""
        return bearer.claims(self.name, head, destination)

    def judge(self, head: Head, destination: Destination, now: datetime) -> int:
        """The id of the live credential that the presented token satisfies.

        Raises Unverified: what `jose.prove` and `check` raise, `jwt_credential_missing`, `jwt_credential_expired`; and
        Unavailable where only the keys of a credential that could match are stale.
        """
        credentials = self.held(destination)
        token = bearer.presented(head)
        assert token is not None
        if not credentials:
            raise Unverified("jwt_credential_missing")
        refusals: list[Unverified] = []
        stale: Unavailable | None = None
        for credential in credentials:
            if live(credential, now):
                try:
                    self.check(jose.prove(token, credential.rules, now), credential)
                except Unverified as exc:
                    refusals.append(exc)
                except Unavailable as exc:
                    stale = exc
                else:
                    return credential.id
        if stale is not None:
            raise stale
        if not refusals:
            raise Unverified("jwt_credential_expired")
        raise max(refusals, key=lambda exc: _PROGRESS.index(exc.reason) if exc.reason in _PROGRESS else len(_PROGRESS))


class JwtKind(IssuedTokenKind[JwtSettings, JwtCredential]):
    """A token of any issuer."""

    name = "jwt"
    says = "a signed token with each request"
    settings = JwtSettings
    credential = JwtCredential
    options = (
        Takes(option=ISSUER, setting="issuers", needed=True),
        Takes(option=AUDIENCE, setting="audiences", needed=True),
        Takes(option=SUBJECT),
        *OPTIONS,
        Takes(option=LIFETIME),
    )

    def make(self, read: JwtSettings, stored: Stored) -> JwtCredential:
        """The keys and what a token must be."""
        return JwtCredential(rules=read.rules(stored), subject=read.subject, **stored.common)

    def check(self, claims: Mapping[str, Any], credential: JwtCredential) -> None:
        """The subject."""
        if credential.subject is not None and claims.get("sub") != credential.subject:
            raise Unverified("jwt_subject_wrong")
