"""Kind `oauth`, and what `smart` shares with it: an access token that this receiver's token endpoint issues.

A JWT according to RFC 9068 (receiver.protocol.tokens grants it), signed with a key that is not shared and that no key
set publishes. It is valid at one destination, for the credential that requested it, and only as long as that credential
is live: revoking the credential ends its tokens.

Must not reveal more about a token than whether it is valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import ClassVar, Final, TypeVar

import jwt
import msgspec

from receiver.errors import ConfigurationError, Unverified
from receiver.protocol import jose
from receiver.protocol.jose import Rules, VerifyingKey
from receiver.protocol.message import Head
from receiver.protocol.registry import Credential, Destination, live
from receiver.protocol.verification import bearer
from receiver.protocol.verification.kind import (
    CredentialOption,
    CredentialSettings,
    HeadKind,
    OptionUse,
    Seconds,
    SecretStorage,
    StoredCredential,
)
from receiver.protocol.verification.public_keys import AUDIENCE, LIFETIME, TOKEN_REASONS

ALGORITHM: Final = "HS256"
# RFC 9068 2.1.
_TYPE: Final = "at+jwt"

# Access tokens are short-lived: only revoking the credential stops a stolen one earlier.
MAX_ACCESS_LIFETIME: Final = 3600
# The parameters that can be renamed in Redox's dashboard (fields grantType, clientId, clientSecret, audience, scopes).
PARAMETERS: Final = (
    "grant_type",
    "client_id",
    "client_secret",
    "scope",
    "audience",
    "client_assertion",
    "client_assertion_type",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """What a client of the token endpoint may request, and in which form (Redox: the fields of its OAuth strategies).

    `names`: parameter → the name under which Redox sends it, if it differs. `audience`: the only one that a client may
    request, if it requests one; None: any. `scopes`: what a client may request, and what it gets if it requests none.
    `lifetime`: seconds of a token.
    """

    client_id: str
    names: Mapping[str, str] = field(default_factory=dict)
    grant_type: str = "client_credentials"
    audience: str | None = None
    scopes: tuple[str, ...] = ()
    lifetime: int = 300

    def __post_init__(self) -> None:
        if not self.client_id:
            raise ConfigurationError("a client of the token endpoint has a client id")
        if not 1 <= self.lifetime <= MAX_ACCESS_LIFETIME:
            raise ConfigurationError(f"an access token lives from 1 to {MAX_ACCESS_LIFETIME} seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessTokenCredential(Credential):
    """A client of the token endpoint. `token_keys` sign and verify access tokens; the first signs."""

    kind: ClassVar[str]
    client: Client
    token_keys: tuple[VerifyingKey, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class OAuthCredential(AccessTokenCredential):
    """A client with a secret, stored as HMAC-SHA256 under `key`."""

    kind: ClassVar[str] = "oauth"
    digest: bytes = field(repr=False)
    key: bytes = field(repr=False)


class ClientSettings(CredentialSettings, kw_only=True):
    """The settings of Client."""

    client_id: str
    names: dict[str, str] = msgspec.field(default_factory=dict)
    grant_type: str = "client_credentials"
    audience: str | None = None
    scopes: list[str] = msgspec.field(default_factory=list)
    lifetime: Seconds = 300

    def client(self) -> Client:
        """Return the client. Raises ConfigurationError."""
        return Client(
            client_id=self.client_id,
            names=self.names,
            grant_type=self.grant_type,
            audience=self.audience,
            scopes=tuple(self.scopes),
            lifetime=self.lifetime,
        )


def _names(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, sent = pair.partition("=")
        if not equals or not sent:
            raise ConfigurationError(f"{pair!r} is not valid: use NAME=SENT, such as client_id=clientId")
        found[name] = sent
    return found


CLIENT_OPTIONS: Final = (
    OptionUse(
        option=CredentialOption(name="client_id", help="client id, as entered in the Redox dashboard."), required=True
    ),
    OptionUse(option=AUDIENCE, single=True),
    OptionUse(
        option=CredentialOption(name="scope", help="scope that Redox may request; may be repeated.", multiple=True),
        setting="scopes",
    ),
    OptionUse(option=LIFETIME),
    OptionUse(
        option=CredentialOption(
            name="parameter",
            metavar="NAME=SENT",
            multiple=True,
            help="read the parameter NAME from the form field SENT; may be repeated.",
        ),
        setting="names",
        convert=_names,
    ),
    OptionUse(option=CredentialOption(name="grant_type", help="required grant_type.  [default: client_credentials]")),
)

_ClientSettings = TypeVar("_ClientSettings", bound=ClientSettings)
_AccessToken = TypeVar("_AccessToken", bound=AccessTokenCredential)


class AccessTokenKind(HeadKind[_ClientSettings, _AccessToken]):
    """An access token of this receiver's token endpoint. The kinds differ in how the client authenticates there.

    A new one is also listed in `bearer.OWN_KINDS`, and receiver.protocol.tokens authenticates its clients.
    """

    token_endpoint = True
    reasons: ClassVar[Mapping[str, str]] = TOKEN_REASONS | {
        "jwt_type_wrong": "the token names this receiver as its issuer, but is not an access token",
        "jwt_credential_missing": "the destination has no such client",
        "jwt_credential_expired": "the client's credential has expired or was revoked: add another",
    }

    def normalize(self, settings: _ClientSettings) -> _ClientSettings:
        """Check the renamed parameters."""
        if unknown := sorted(settings.names.keys() - set(PARAMETERS)):
            raise ConfigurationError(
                f"{', '.join(unknown)}: the parameters that may be renamed are {', '.join(PARAMETERS)}"
            )
        return settings

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - the interface
        """See `bearer.claims`."""
        return bearer.claims(self.name, head, destination)

    def match(self, head: Head, destination: Destination, now: datetime) -> int:
        """Return the id of the credential that requested the token."""
        token = bearer.presented(head)
        assert token is not None
        presented = jose.peek(token)
        if presented.header.get("typ") != _TYPE:
            raise Unverified("jwt_type_wrong")
        named = [each for each in self.held(destination) if presented.claims.get("sub") == _subject(each)]
        if not named:
            raise Unverified("jwt_credential_missing")
        credential = named[0]
        jose.verify(token, _rules(destination.id, credential.token_keys), now)
        if not live(credential, now):
            raise Unverified("jwt_credential_expired")
        return credential.id


class OAuthKind(AccessTokenKind[ClientSettings, OAuthCredential]):
    """The client has a secret."""

    name = "oauth"
    text = "an access token that this receiver issues for a client secret"
    settings = ClientSettings
    credential = OAuthCredential
    secret = SecretStorage.DIGESTED
    digest_label = "client secret"
    generated_secret = "client_secret"  # noqa: S105 - a field's name
    options = CLIENT_OPTIONS

    def make(self, settings: ClientSettings, stored: StoredCredential) -> OAuthCredential:
        """Return the client and the digest of its secret."""
        return OAuthCredential(
            client=settings.client(),
            digest=stored.digest,
            key=stored.digest_key,
            token_keys=stored.token_keys,
            **stored.common,
        )


def issue(
    credential: AccessTokenCredential, destination: Destination, now: datetime, *, scopes: Sequence[str], jti: str
) -> str:
    """Return a new access token (RFC 9068 2.2). `jti`: a unique name."""
    issued = int(now.timestamp())
    claims = {
        "iss": bearer.OWN_ISSUER,
        "sub": _subject(credential),
        "aud": _audience(destination.id),
        "iat": issued,
        "exp": issued + credential.client.lifetime,
        "jti": jti,
        "client_id": credential.client.client_id,
    }
    if scopes:
        claims["scope"] = " ".join(scopes)
    key = credential.token_keys[0]
    assert isinstance(key.key, bytes)
    return jwt.encode(claims, key.key, algorithm=ALGORITHM, headers={"typ": _TYPE, "kid": key.kid})


def _subject(credential: AccessTokenCredential) -> str:
    return f"{credential.kind}:{credential.id}"


def _audience(destination: int) -> str:
    return f"{bearer.OWN_ISSUER}:destination:{destination}"


# jose compares rules by identity: the same object for a destination as long as its keys are the same.
@lru_cache(maxsize=1024)
def _rules(destination: int, keys: tuple[VerifyingKey, ...]) -> Rules:
    return Rules(
        issuers=(bearer.OWN_ISSUER,),
        audiences=(_audience(destination),),
        algorithms=frozenset({ALGORITHM}),
        keys=keys,
        lifetime=MAX_ACCESS_LIFETIME,
        leeway=0,
    )
