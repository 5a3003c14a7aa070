"""What the kinds share whose tokens or assertions somebody else signs: whose keys prove them, and what they must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Protocol

import msgspec

from receiver.errors import ConfigurationError
from receiver.protocol.jose import ALGORITHMS, LEEWAY, Rules, VerifyingKey, read_keys
from receiver.protocol.registry import Credential
from receiver.protocol.verification.kind import HOUR, Option, Settings, Stored, Takes

# Seconds that fetched keys are trusted after the last fetch that succeeded, unless a credential says otherwise.
MAX_STALE: Final = 72 * HOUR
MaxStale = Annotated[int, msgspec.Meta(ge=60, le=366 * 24 * HOUR)]
Leeway = Annotated[int, msgspec.Meta(ge=0, le=300)]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyedCredential(Credential):
    """A credential that public keys prove."""

    rules: Rules

    @property
    def stale(self) -> bool:
        """Whether the keys of a URL are."""
        return self.rules.stale


class KeySettings(Settings, kw_only=True):
    """Whose keys: of a URL, fetched on a timer, or `keys`, the text of a JWKS or PEM.

    `max_stale`: seconds that those of a URL are trusted after the last fetch that succeeded.
    """

    jwks_url: str | None = None
    keys: str | None = None
    max_stale: MaxStale = MAX_STALE
    leeway: Leeway = LEEWAY


class _HasKeys(Protocol):
    """Settings with these of KeySettings. (msgspec allows one base: kind smart has another.)"""

    jwks_url: str | None
    keys: str | None
    max_stale: int


def find_keys(read: _HasKeys, stored: Stored) -> tuple[tuple[VerifyingKey, ...], bool]:
    """The keys, none as long as they were never fetched; and whether they are stale. Raises ConfigurationError."""
    if (read.keys is None) == (read.jwks_url is None):
        raise ConfigurationError("public keys come from a file or from a URL: give one of --keys and --jwks-url")
    if read.jwks_url is not None:
        return stored.key_set(read.jwks_url, read.max_stale)
    if read.max_stale != MAX_STALE:
        raise ConfigurationError("--max-stale is for keys of a --jwks-url: keys of a file do not get old")
    return read_keys((read.keys or "").encode()), False


OPTIONS: Final = (
    Takes(option=Option(name="keys", help="the signer's public keys: a JWKS, or PEM.", file=True)),
    Takes(
        option=Option(
            name="jwks_url",
            metavar="URL",
            help="where they are published (https); fetched again on a timer.  [default of google: Google's]",
        )
    ),
    Takes(
        option=Option(
            name="max_stale",
            duration=True,
            metavar="TIME",
            help="trust the keys of the URL for TIME after the last fetch that succeeded, such as 72h or 7d; then requests "
            "are answered 503.  [default: 72h]",
        )
    ),
    Takes(
        option=Option(name="algorithm", help="what may sign, such as RS384; may be repeated.", multiple=True),
        setting="algorithms",
    ),
    Takes(
        option=Option(
            name="leeway", bounds=(0, 300), help="seconds that the signer's clock may be wrong.  [default: 30]"
        )
    ),
)
# These mean something to tokens that are presented, and to clients that ask for one.
AUDIENCE: Final = Option(
    name="audience", multiple=True, help="whom it is for (aud), or what Redox asks a token for; may be repeated."
)
LIFETIME: Final = Option(
    name="lifetime", bounds=(1, 24 * HOUR), help="seconds that a token may live.  [default: 3600; of ours 300]"
)
SUBJECT: Final = Option(name="subject", help="the one it is about (sub), or of the certificate (RFC 4514).")

# What `jose.prove` finds.
REASONS: Final = {
    "jwt_malformed": "the token is not a JSON Web Token",
    "jwt_header_refused": "the token's header asks for what is never done: keys from a URL, encryption, unknown rules",
    "jwt_algorithm_wrong": "the token is signed with an algorithm that the credential does not take (--algorithm)",
    "jwt_key_unknown": "none of the credential's keys has the token's key id, or may be used with its algorithm",
    "jwt_signature_wrong": "the token's signature does not hold with the credential's keys",
    "jwt_claim_missing": "the token lacks exp, iat, iss or aud",
    "jwt_issuer_wrong": "the token is from another issuer than the credential names",
    "jwt_audience_wrong": "the token is for another audience than the credential names",
    "jwt_audience_not_alone": "the assertion names other audiences as well (--other-audiences takes it)",
    "jwt_expired": "the token has expired: compare the clocks too",
    "jwt_not_yet_valid": "the token is not valid yet: compare the clocks",
    "jwt_lives_too_long": "the token lives longer than the credential allows (--lifetime)",
}


def algorithms(named: list[str]) -> frozenset[str]:
    """Those that may sign. Raises ConfigurationError for one that proves nothing."""
    if unknown := sorted(set(named) - ALGORITHMS):
        raise ConfigurationError(f"{', '.join(unknown)}: choose algorithms of {', '.join(sorted(ALGORITHMS))}")
    return frozenset(named)
