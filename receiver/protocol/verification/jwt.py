"""Kind `jwt`: a signed JWT with each request, from an issuer whose public keys are configured.

Redox: JWT bearer. Redox does not document the claims, algorithm and keys of its tokens: all are settings.

Must not fetch a key that a token names, nor accept a token with a longer lifetime than the credential allows.
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
from receiver.protocol.verification.kind import HOUR, CredentialOption, HeadKind, OptionUse, Seconds, StoredCredential
from receiver.protocol.verification.public_keys import (
    AUDIENCE,
    KEY_OPTIONS,
    LIFETIME,
    SUBJECT,
    TOKEN_REASONS,
    PublicKeySettings,
    algorithms,
    find_keys,
)

ISSUER: Final = CredentialOption(name="issuer", help="accepted issuer (iss); may be repeated.", multiple=True)
ALGORITHMS: Final = ("RS256", "RS384", "ES256", "ES384")

# The order of the checks. If a token fails with several credentials, the reason of the check that it came furthest with
# is reported.
_CHECK_ORDER: Final = (
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


@dataclass(frozen=True, kw_only=True, slots=True)
class JwtCredential(IssuedCredential):
    """Signed tokens that Redox presents, and the rules for them. `subject` None: any subject of the issuer."""

    kind: ClassVar[str] = "jwt"
    subject: str | None = None


class JwtSettings(PublicKeySettings, kw_only=True):
    """The settings of JwtCredential and of Rules."""

    issuers: list[str]
    audiences: list[str]
    algorithms: list[str] = msgspec.field(default_factory=lambda: list(ALGORITHMS))
    lifetime: Seconds = HOUR
    subject: str | None = None

    def rules(self, stored: StoredCredential) -> Rules:
        """Return the rules for a token. Raises ConfigurationError."""
        if bearer.OWN_ISSUER in self.issuers:
            raise ConfigurationError(f"{bearer.OWN_ISSUER} is the issuer of this receiver's own access tokens")
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
    """A kind whose tokens a known issuer signs. `check` compares the claims of a token that verifies."""

    reasons: ClassVar[Mapping[str, str]] = TOKEN_REASONS | {
        "jwt_credential_missing": "the destination has no credential of the token's kind",
        "jwt_credential_expired": "the credential of the token's kind has expired or was revoked: add another",
        "jwt_subject_wrong": "the token's subject is not the credential's",
    }

    @abstractmethod
    def check(self, claims: Mapping[str, Any], credential: _Issued) -> None:
        """Raise Unverified for claims of another subject than the credential's."""

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - the interface
        """See `bearer.claims`."""
        return bearer.claims(self.name, head, destination)

    def match(self, head: Head, destination: Destination, now: datetime) -> int:
        """Return the id of the live credential whose rules the token satisfies.

        Raises Unverified: a reason of `jose.verify` or `check`, `jwt_credential_missing`, `jwt_credential_expired`.
        Raises Unavailable if only the keys of a credential that could match are stale.
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
                    self.check(jose.verify(token, credential.rules, now), credential)
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
        raise max(refusals, key=_checks_passed)


def _checks_passed(refusal: Unverified) -> int:
    return _CHECK_ORDER.index(refusal.reason) if refusal.reason in _CHECK_ORDER else len(_CHECK_ORDER)


class JwtKind(IssuedTokenKind[JwtSettings, JwtCredential]):
    """A token of any issuer."""

    name = "jwt"
    text = "a signed JWT with each request"
    settings = JwtSettings
    credential = JwtCredential
    options = (
        OptionUse(option=ISSUER, setting="issuers", required=True),
        OptionUse(option=AUDIENCE, setting="audiences", required=True),
        *KEY_OPTIONS,
        OptionUse(option=SUBJECT),
        OptionUse(option=LIFETIME),
    )

    def make(self, settings: JwtSettings, stored: StoredCredential) -> JwtCredential:
        """Return the rules for a token."""
        return JwtCredential(rules=settings.rules(stored), subject=settings.subject, **stored.common)

    def check(self, claims: Mapping[str, Any], credential: JwtCredential) -> None:
        """Compare the subject."""
        if credential.subject is not None and claims.get("sub") != credential.subject:
            raise Unverified("jwt_subject_wrong")
