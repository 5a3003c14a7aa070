"""Kind `google`: a JWT that Google signs for Redox's service account.

Redox: OAuth 2.0 two-legged with JWT for GCP, and Google Workload Identity Federation. It is a JWT like any other, but
Google signs for everybody: only the account, by its e-mail address or subject, distinguishes Redox from a stranger.

Must not trust an e-mail address that Google has not verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import msgspec

from receiver.errors import ConfigurationError, Unverified
from receiver.protocol.verification.bearer import IssuedCredential
from receiver.protocol.verification.jwt import ISSUER, IssuedTokenKind, JwtSettings
from receiver.protocol.verification.kind import CredentialOption, OptionUse, StoredCredential
from receiver.protocol.verification.public_keys import AUDIENCE, KEY_OPTIONS, LIFETIME, SUBJECT

# Google: OpenID Connect. Both spellings of the issuer are in use; its keys are at the URL, and sign RS256.
ISSUERS: Final = ("https://accounts.google.com", "accounts.google.com")
JWKS_URL: Final = "https://www.googleapis.com/oauth2/v3/certs"
ALGORITHMS: Final = ("RS256",)


@dataclass(frozen=True, kw_only=True, slots=True)
class GoogleCredential(IssuedCredential):
    """Tokens that Google signs for one account: its `email`, its `subject` (the account's number), or both.

    Google signs for everybody, for any audience: only the account distinguishes Redox from a stranger.
    """

    kind: ClassVar[str] = "google"
    email: str | None = None
    subject: str | None = None

    def __post_init__(self) -> None:
        if not self.email and not self.subject:
            raise ConfigurationError(
                "kind google needs the e-mail or the subject of the account: anybody can have a token from Google for "
                "your audience"
            )


class GoogleSettings(JwtSettings, kw_only=True):
    """The settings of GoogleCredential and of Rules."""

    issuers: list[str] = msgspec.field(default_factory=lambda: list(ISSUERS))
    algorithms: list[str] = msgspec.field(default_factory=lambda: list(ALGORITHMS))
    email: str | None = None


class GoogleKind(IssuedTokenKind[GoogleSettings, GoogleCredential]):
    """A token that Google signs."""

    name = "google"
    text = "a JWT that Google signs"
    settings = GoogleSettings
    credential = GoogleCredential
    options = (
        OptionUse(option=AUDIENCE, setting="audiences", required=True),
        *KEY_OPTIONS,
        OptionUse(option=ISSUER, setting="issuers"),
        OptionUse(option=CredentialOption(name="email", help="e-mail address of the service account.")),
        OptionUse(option=SUBJECT),
        OptionUse(option=LIFETIME),
    )
    reasons: ClassVar = {
        **IssuedTokenKind.reasons,
        "jwt_email_wrong": "the token's e-mail address is not the credential's, or Google has not verified it",
    }

    def normalize(self, settings: GoogleSettings) -> GoogleSettings:
        """Use Google's keys unless others are given."""
        if settings.keys is None and settings.jwks_url is None:
            return msgspec.structs.replace(settings, jwks_url=JWKS_URL)
        return settings

    def make(self, settings: GoogleSettings, stored: StoredCredential) -> GoogleCredential:
        """Return the rules for a token, and the account."""
        return GoogleCredential(
            rules=settings.rules(stored), email=settings.email, subject=settings.subject, **stored.common
        )

    def check(self, claims: Mapping[str, Any], credential: GoogleCredential) -> None:
        """Compare the account."""
        if credential.email is not None and (
            claims.get("email") != credential.email or claims.get("email_verified") is not True
        ):
            raise Unverified("jwt_email_wrong")
        if credential.subject is not None and claims.get("sub") != credential.subject:
            raise Unverified("jwt_subject_wrong")
