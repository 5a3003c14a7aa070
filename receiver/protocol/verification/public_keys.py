"""What kinds with public keys share: settings and options of the keys, and the reasons of a token that fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Protocol

import msgspec

from receiver.errors import ConfigurationError
from receiver.protocol.jose import ALGORITHMS, LEEWAY, Rules, VerifyingKey, read_keys
from receiver.protocol.registry import Credential
from receiver.protocol.verification.kind import HOUR, CredentialOption, CredentialSettings, OptionUse, StoredCredential

# Seconds that fetched keys are trusted after the last successful fetch, unless a credential sets its own.
MAX_STALE: Final = 72 * HOUR
MaxStale = Annotated[int, msgspec.Meta(ge=60, le=366 * 24 * HOUR)]
Leeway = Annotated[int, msgspec.Meta(ge=0, le=300)]


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicKeyCredential(Credential):
    """A credential that is verified with public keys."""

    rules: Rules

    @property
    def stale(self) -> bool:
        """Whether its fetched keys are stale."""
        return self.rules.stale


class PublicKeySettings(CredentialSettings, kw_only=True):
    """The source of public keys: a URL, fetched on a timer, or `keys`, the text of a JWKS or PEM.

    `max_stale`: seconds that keys of a URL are trusted after the last successful fetch.
    """

    jwks_url: str | None = None
    keys: str | None = None
    max_stale: MaxStale = MAX_STALE
    leeway: Leeway = LEEWAY


class _HasKeys(Protocol):
    """Settings with these fields of PublicKeySettings. (msgspec allows one base class, and kind smart has another.)"""

    jwks_url: str | None
    keys: str | None
    max_stale: int


def find_keys(settings: _HasKeys, stored: StoredCredential) -> tuple[tuple[VerifyingKey, ...], bool]:
    """Return the keys (none until they are fetched), and whether they are stale. Raises ConfigurationError."""
    if (settings.keys is None) == (settings.jwks_url is None):
        raise ConfigurationError("public keys come from a file or from a URL: give one of --keys and --jwks-url")
    if settings.jwks_url is not None:
        return stored.key_set(settings.jwks_url, settings.max_stale)
    if settings.max_stale != MAX_STALE:
        raise ConfigurationError("--max-stale is for keys of a --jwks-url: keys of a file do not get old")
    return read_keys((settings.keys or "").encode()), False


def algorithms(names: list[str]) -> frozenset[str]:
    """Return the accepted algorithms. Raises ConfigurationError for one that is not supported."""
    if unknown := sorted(set(names) - ALGORITHMS):
        raise ConfigurationError(f"{', '.join(unknown)}: choose algorithms of {', '.join(sorted(ALGORITHMS))}")
    return frozenset(names)


KEY_OPTIONS: Final = (
    OptionUse(option=CredentialOption(name="keys", help="public keys of the signer, as JWKS or PEM.", file=True)),
    OptionUse(
        option=CredentialOption(
            name="jwks_url",
            metavar="URL",
            help="URL (https) of the JWKS, fetched periodically.  [default for google: Google's]",
        )
    ),
    OptionUse(
        option=CredentialOption(
            name="max_stale",
            duration=True,
            metavar="TIME",
            help="trust fetched keys for TIME (such as 72h or 7d) after the last successful fetch; after that, "
            "requests get 503.  [default: 72h]",
        )
    ),
    OptionUse(
        option=CredentialOption(
            name="algorithm", help="accepted algorithm, such as RS384; may be repeated.", multiple=True
        ),
        setting="algorithms",
    ),
    OptionUse(
        option=CredentialOption(
            name="leeway", bounds=(0, 300), help="tolerated clock difference, in seconds.  [default: 30]"
        )
    ),
)
# Options of kinds whose tokens an issuer signs, and of clients of the token endpoint.
AUDIENCE: Final = CredentialOption(
    name="audience",
    multiple=True,
    help="accepted audience (aud), or the audience that Redox requests; may be repeated.",
)
LIFETIME: Final = CredentialOption(
    name="lifetime",
    bounds=(1, 24 * HOUR),
    help="longest lifetime of a token, in seconds.  [default: 3600; for oauth and smart 300]",
)
SUBJECT: Final = CredentialOption(
    name="subject", help="required subject (sub), or subject of the certificate (RFC 4514)."
)

# The reasons of `jose.verify`.
TOKEN_REASONS: Final = {
    "jwt_malformed": "the token is not a JSON Web Token",
    "jwt_header_refused": "the token's header requests keys from a URL, encryption, or an extension that is unknown",
    "jwt_algorithm_wrong": "the credential does not accept the token's algorithm (--algorithm)",
    "jwt_key_unknown": "no key of the credential has the token's key id, or may be used with its algorithm",
    "jwt_signature_wrong": "the token's signature does not verify with the credential's keys",
    "jwt_claim_missing": "the token lacks exp, iat, iss or aud",
    "jwt_issuer_wrong": "the token's issuer is not one of the credential's",
    "jwt_audience_wrong": "the token's audience is not one of the credential's",
    "jwt_audience_not_alone": "the assertion names other audiences too (--other-audiences accepts it)",
    "jwt_expired": "the token has expired: compare the clocks",
    "jwt_not_yet_valid": "the token is not valid yet: compare the clocks",
    "jwt_lives_too_long": "the token's lifetime is longer than the credential allows (--lifetime)",
}
