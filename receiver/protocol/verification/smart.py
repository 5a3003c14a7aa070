"""Kind `smart`: an access token that this receiver's token endpoint issues for a signed assertion.

Redox: SMART backend (private_key_jwt). The client authenticates at the endpoint with an assertion (RFC 7523), which
receiver.protocol.tokens verifies; the access token is the same as for kind `oauth`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import msgspec

from receiver.protocol.jose import LEEWAY, Rules
from receiver.protocol.verification.kind import CredentialOption, OptionUse, Seconds, StoredCredential
from receiver.protocol.verification.oauth import CLIENT_OPTIONS, AccessTokenCredential, AccessTokenKind, ClientSettings
from receiver.protocol.verification.public_keys import KEY_OPTIONS, MAX_STALE, Leeway, MaxStale, algorithms, find_keys

# Seconds that an assertion may live (Redox, like SMART: five minutes).
ASSERTION_LIFETIME: Final = 300
# SMART App Launch: the algorithms that a server must support.
ASSERTION_ALGORITHMS: Final = ("RS384", "ES384")


@dataclass(frozen=True, kw_only=True, slots=True)
class SmartCredential(AccessTokenCredential):
    """A client that authenticates with a signed assertion (RFC 7523): iss = sub = its id, aud = the token URL."""

    kind: ClassVar[str] = "smart"
    rules: Rules

    @property
    def stale(self) -> bool:
        """Whether its fetched keys are stale."""
        return self.rules.stale


class SmartSettings(ClientSettings, kw_only=True):
    """The settings of Client, and the rules for an assertion. `audiences`: this receiver's token URL. Keys as in
    PublicKeySettings.
    """

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
    text = "an access token that this receiver issues for a signed assertion"
    settings = SmartSettings
    credential = SmartCredential
    options = (
        *CLIENT_OPTIONS,
        OptionUse(
            option=CredentialOption(
                name="token_url",
                metavar="URL",
                multiple=True,
                help="public URL of this receiver's token endpoint; may be repeated.",
            ),
            setting="audiences",
            required=True,
        ),
        *KEY_OPTIONS,
        OptionUse(
            option=CredentialOption(
                name="other_audiences",
                flag=True,
                help="accept assertions that name audiences other than --token-url too.",
            )
        ),
    )

    def make(self, settings: SmartSettings, stored: StoredCredential) -> SmartCredential:
        """Return the client, with the rules for its assertion."""
        keys, stale = find_keys(settings, stored)
        rules = Rules(
            issuers=(settings.client_id,),
            audiences=tuple(settings.audiences),
            keys=keys,
            stale=stale,
            algorithms=algorithms(settings.algorithms),
            lifetime=settings.assertion_lifetime,
            leeway=settings.leeway,
            other_audiences=settings.other_audiences,
        )
        return SmartCredential(client=settings.client(), rules=rules, token_keys=stored.token_keys, **stored.common)
