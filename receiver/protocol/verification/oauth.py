"""Kind `oauth`, and what `smart` shares with it: an access token that our own token endpoint issued.

A JWT after RFC 9068 (receiver.protocol.tokens grants it), signed with a key that nobody else has and that no key set
publishes. It is good at one destination, for the credential that asked for it, and no longer than that credential: who
revokes it ends its tokens.

Must not tell more of a token than whether it is good.
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
from receiver.protocol.verification.kind import HeadKind, Option, Seconds, Secret, Settings, Stored, Takes
from receiver.protocol.verification.public_keys import AUDIENCE, LIFETIME, REASONS

ALGORITHM: Final = "HS256"
# RFC 9068 2.1.
_TYPE: Final = "at+jwt"

# What our token endpoint gives ends soon, for between a theft and its end nothing but revoking the credential helps.
MAX_ACCESS_LIFETIME: Final = 3600
# The parameters that Redox lets one rename (its fields grantType, clientId, clientSecret, audience, scopes …).
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
    """What a client of our token endpoint may ask for, and how it asks (Redox: the fields of its OAuth strategies).

    `names`: parameter → the name under which Redox was told to send it, where it is another. `audience`: the only one
    that a client may name, if it names one; None: any. `scopes`: what may be asked for, and what is given to who asks
    for none. `lifetime`: seconds of a token.
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
    """A client of the token endpoint. `token_keys` sign and prove our access tokens; the first signs."""

    kind: ClassVar[str]
    client: Client
    token_keys: tuple[VerifyingKey, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class OAuthCredential(AccessTokenCredential):
    """A client with a secret, kept as HMAC-SHA256 under `key`."""

    kind: ClassVar[str] = "oauth"
    digest: bytes = field(repr=False)
    key: bytes = field(repr=False)


class ClientSettings(Settings, kw_only=True):
    """Those of Client."""

    client_id: str
    names: dict[str, str] = msgspec.field(default_factory=dict)
    grant_type: str = "client_credentials"
    audience: str | None = None
    scopes: list[str] = msgspec.field(default_factory=list)
    lifetime: Seconds = 300

    def client(self) -> Client:
        """The client. Raises ConfigurationError."""
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
            raise ConfigurationError(f"{pair!r}: write NAME=SENT, such as client_id=clientId")
        found[name] = sent
    return found


CLIENT_ID: Final = Option(name="client_id", help="the client id that is typed into the dashboard.")
CLIENT_OPTIONS: Final = (
    Takes(option=CLIENT_ID, needed=True),
    Takes(option=AUDIENCE, one=True),
    Takes(
        option=Option(name="scope", help="a scope that may be asked for; may be repeated.", multiple=True),
        setting="scopes",
    ),
    Takes(option=LIFETIME),
    Takes(
        option=Option(
            name="parameter",
            metavar="NAME=SENT",
            multiple=True,
            help="Redox sends the parameter NAME as SENT; may be repeated.",
        ),
        setting="names",
        read=_names,
    ),
    Takes(option=Option(name="grant_type", help="what grant_type says.  [default: client_credentials]")),
)

_Settings = TypeVar("_Settings", bound=ClientSettings)
_Own = TypeVar("_Own", bound=AccessTokenCredential)


class AccessTokenKind(HeadKind[_Settings, _Own]):
    """An access token of our token endpoint: kinds differ in how the client proves itself there.

    A new one also stands in `bearer.OWN_KINDS`, and receiver.protocol.tokens judges what its clients send.
    """

    token_endpoint = True
    reasons: ClassVar[Mapping[str, str]] = REASONS | {
        "jwt_type_wrong": "the token says that it is ours, and is not an access token",
        "jwt_credential_missing": "there is no such client any more",
        "jwt_credential_expired": "the client's credential has expired or was revoked",
    }

    def normalise(self, read: _Settings) -> _Settings:
        """Renames only parameters that there are."""
        if unknown := sorted(read.names.keys() - set(PARAMETERS)):
            raise ConfigurationError(
                f"{', '.join(unknown)}: the parameters that may be renamed are {', '.join(PARAMETERS)}"
            )
        return read

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - Kind's
        """See `bearer.claims`."""
        return bearer.claims(self.name, head, destination)

    def judge(self, head: Head, destination: Destination, now: datetime) -> int:
        """The one credential that asked for the token."""
        token = bearer.presented(head)
        assert token is not None
        said = jose.peek(token)
        if said.header.get("typ") != _TYPE:
            raise Unverified("jwt_type_wrong")
        named = [each for each in self.held(destination) if said.claims.get("sub") == _subject(each)]
        if not named:
            raise Unverified("jwt_credential_missing")
        credential = named[0]
        jose.prove(token, _rules(destination.id, credential.token_keys), now)
        if not live(credential, now):
            raise Unverified("jwt_credential_expired")
        return credential.id


class OAuthKind(AccessTokenKind[ClientSettings, OAuthCredential]):
    """The client has a secret."""

    name = "oauth"
    says = "an access token of ours, for a client secret"
    settings = ClientSettings
    credential = OAuthCredential
    secret = Secret.DIGESTED
    digest_label = "client secret"
    made = "client_secret"
    options = CLIENT_OPTIONS

    def make(self, read: ClientSettings, stored: Stored) -> OAuthCredential:
        """The client and the digest of its secret."""
        return OAuthCredential(
            client=read.client(),
            digest=stored.digest,
            key=stored.digest_key,
            token_keys=stored.token_keys,
            **stored.common,
        )


def issue(
    credential: AccessTokenCredential, destination: Destination, now: datetime, *, scopes: Sequence[str], jti: str
) -> str:
    """A new access token (RFC 9068 2.2). `jti` is a name never used before."""
    issued = int(now.timestamp())
    claims = {
        "iss": bearer.OURS,
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
    return f"{bearer.OURS}:destination:{destination}"


# Rules are told apart by identity (jose): the same ones for a destination and its keys, as long as those are the same.
@lru_cache(maxsize=1024)
def _rules(destination: int, keys: tuple[VerifyingKey, ...]) -> Rules:
    return Rules(
        issuers=(bearer.OURS,),
        audiences=(_audience(destination),),
        algorithms=frozenset({ALGORITHM}),
        keys=keys,
        lifetime=MAX_ACCESS_LIFETIME,
        leeway=0,
    )
