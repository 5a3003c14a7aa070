"""Kind `google`: a token that Google signed for Redox's account.

Redox: OAuth 2.0 two-legged with JWT for GCP, and Google Workload Identity Federation. It is a JWT like another, but
that its issuer signs for everybody: what tells Redox from a stranger is the account, by its e-mail or its subject.

May not believe an e-mail that Google does not call verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import msgspec

from receiver.errors import ConfigurationError, Unverified
from receiver.protocol.verification.bearer import IssuedCredential
from receiver.protocol.verification.jwt import ISSUER, IssuedTokenKind, JwtSettings
from receiver.protocol.verification.kind import Option, Stored, Takes
from receiver.protocol.verification.public_keys import AUDIENCE, LIFETIME, OPTIONS, SUBJECT

# Google: OpenID Connect. Both spellings of the issuer are in use; its keys are at the URL, and sign RS256.
ISSUERS: Final = ("https://accounts.google.com", "accounts.google.com")
JWKS_URL: Final = "https://www.googleapis.com/oauth2/v3/certs"
ALGORITHMS: Final = ("RS256",)


@dataclass(frozen=True, kw_only=True, slots=True)
class GoogleCredential(IssuedCredential):
    """Tokens that Google signed for one account: its `email`, its `subject` (the account's number), or both.

    Google signs for everybody, for whatever audience they ask for: only the account tells Redox from a stranger.
    """

    kind: ClassVar[str] = "google"
    email: str | None = None
    subject: str | None = None

    def __post_init__(self) -> None:
        if not self.email and not self.subject:
            raise ConfigurationError(
                "kind google needs the e-mail or the subject of the account: anybody can have a "
                "token from Google for your audience"
            )


class GoogleSettings(JwtSettings, kw_only=True):
    """Those of GoogleCredential and of Rules."""

    issuers: list[str] = msgspec.field(default_factory=lambda: list(ISSUERS))
    algorithms: list[str] = msgspec.field(default_factory=lambda: list(ALGORITHMS))
    email: str | None = None


class GoogleKind(IssuedTokenKind[GoogleSettings, GoogleCredential]):
    """A token of Google's."""

    name = "google"
    says = "a token that Google signed"
    settings = GoogleSettings
    credential = GoogleCredential
    options = (
        Takes(option=AUDIENCE, setting="audiences", needed=True),
        *OPTIONS,
        Takes(option=ISSUER, setting="issuers"),
        Takes(option=SUBJECT),
        Takes(option=LIFETIME),
        Takes(option=Option(name="email", help="the account's e-mail.")),
    )
    reasons: ClassVar = {
        **IssuedTokenKind.reasons,
        "jwt_email_wrong": "the token is for another account than the credential's, or Google has not verified its "
        "e-mail",
    }

    def normalise(self, read: GoogleSettings) -> GoogleSettings:
        """Google's own keys, unless others are named."""
        if read.keys is None and read.jwks_url is None:
            return msgspec.structs.replace(read, jwks_url=JWKS_URL)
        return read

    def make(self, read: GoogleSettings, stored: Stored) -> GoogleCredential:
        """Google's keys, and the account."""
        return GoogleCredential(rules=read.rules(stored), email=read.email, subject=read.subject, **stored.common)

    def check(self, claims: Mapping[str, Any], credential: GoogleCredential) -> None:
        """The account."""
        if credential.email is not None and (
            claims.get("email") != credential.email or claims.get("email_verified") is not True
        ):
            raise Unverified("jwt_email_wrong")
        if credential.subject is not None and claims.get("sub") != credential.subject:
            raise Unverified("jwt_subject_wrong")
