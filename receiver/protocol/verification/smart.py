"""Kind `smart`: an access token that our own token endpoint issued for a signed assertion.

Redox: SMART backend (private_key_jwt). The client proves itself to the endpoint by an assertion (RFC 7523), which
receiver.protocol.tokens judges; the token itself is that of kind `oauth`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import msgspec

from receiver.protocol.jose import LEEWAY, Rules
from receiver.protocol.verification.kind import Option, Seconds, Stored, Takes
from receiver.protocol.verification.oauth import CLIENT_OPTIONS, AccessTokenCredential, AccessTokenKind, ClientSettings
from receiver.protocol.verification.public_keys import MAX_STALE, OPTIONS, Leeway, MaxStale, algorithms, find_keys

# Seconds that an assertion may live (Redox, like SMART: five minutes).
ASSERTION_LIFETIME: Final = 300
# SMART App Launch: what a server must take.
ASSERTION_ALGORITHMS: Final = ("RS384", "ES384")


@dataclass(frozen=True, kw_only=True, slots=True)
class SmartCredential(AccessTokenCredential):
    """A client that proves itself by a signed assertion (RFC 7523): iss = sub = its id, aud = our token URL."""

    kind: ClassVar[str] = "smart"
    rules: Rules

    @property
    def stale(self) -> bool:
        """Whether the keys of a URL are."""
        return self.rules.stale


class SmartSettings(ClientSettings, kw_only=True):
    """Those of Client, and what an assertion must be: for `audiences`, which are our token URL; keys as KeySettings."""

    audiences: list[str]
    jwks_url: str | None = None
    keys: str | None = None
    max_stale: MaxStale = MAX_STALE
    leeway: Leeway = LEEWAY
    algorithms: list[str] = msgspec.field(default_factory=lambda: list(ASSERTION_ALGORITHMS))
    assertion_lifetime: Seconds = ASSERTION_LIFETIME
    other_audiences: bool = False


class SmartKind(AccessTokenKind[SmartSettings, SmartCredential]):
    """The client has a private key."""

    name = "smart"
    says = "an access token of ours, for a signed assertion"
    settings = SmartSettings
    credential = SmartCredential
    options = (
        *CLIENT_OPTIONS,
        Takes(
            option=Option(
                name="token_url",
                metavar="URL",
                multiple=True,
                help="our token endpoint as Redox calls it; may be repeated.",
            ),
            setting="audiences",
            needed=True,
        ),
        *OPTIONS,
        Takes(
            option=Option(name="other_audiences", flag=True, help="let an assertion name audiences beyond --token-url.")
        ),
    )

    def make(self, read: SmartSettings, stored: Stored) -> SmartCredential:
        """The client, and what its assertion must be."""
        keys, stale = find_keys(read, stored)
        rules = Rules(
            issuers=(read.client_id,),
            audiences=tuple(read.audiences),
            keys=keys,
            stale=stale,
            algorithms=algorithms(read.algorithms),
            lifetime=read.assertion_lifetime,
            leeway=read.leeway,
            other_audiences=read.other_audiences,
        )
        return SmartCredential(client=read.client(), rules=rules, token_keys=stored.token_keys, **stored.common)
