"""What is registered, as one immutable value: destinations with their credentials, sources, subscriptions and policies.

`receiver.storage.registry.loader` loads it and follows changes; here stands what a row means. Must not look anything
up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal

from receiver.errors import ConfigurationError
from receiver.protocol.jose import Rules, VerifyingKey

Environment = Literal["development", "staging", "production"]
TestPolicy = Literal["accept", "quarantine", "reject"]
UnknownSourcePolicy = Literal["reject", "quarantine"]
SourcesPolicy = Literal["registered", "any"]
Ordering = Literal["source", "patient", "none"]

# Headers that every request has for a purpose of its own, or that a proxy in front sets. A signature or a secret that
# was looked for in one of them would refuse the whole feed.
RESERVED_HEADERS: Final = frozenset(
    {
        "accept",
        "accept-charset",
        "accept-encoding",
        "accept-language",
        "authorization",
        "cache-control",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "cookie",
        "date",
        "expect",
        "forwarded",
        "host",
        "keep-alive",
        "origin",
        "pragma",
        "proxy-authorization",
        "proxy-connection",
        "referer",
        "te",
        "traceparent",
        "tracestate",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
        "verification-token",
        "via",
        "x-real-ip",
        "x-request-id",
    }
)
RESERVED_PREFIXES: Final = ("ssl-client-", "x-amz-", "x-amzn-", "x-forwarded-")

# A shorter verification token could be guessed; the dashboard takes any length.
MIN_TOKEN_LENGTH: Final = 24
# What our token endpoint gives ends soon, for between a theft and its end nothing but revoking the credential helps.
MAX_ACCESS_LIFETIME: Final = 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCredential:
    """A verification token, kept as HMAC-SHA256 under `key` (derived from the keyring's index key)."""

    id: int
    digest: bytes = field(repr=False)
    key: bytes = field(repr=False)
    expires_at: datetime | None = None
    revoked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class HmacCredential:
    """A webhook signing secret and how Redox is said to use it (Redox does not publish the wire form: all settings).

    `header` and `timestamp_header` are in lower case. `prefix` (such as `sha256=`) is taken off the value first. With
    `timestamp_header` the signed bytes are that header's value, a full stop, and the body; else the body alone.
    `tolerance` in seconds, to either side.
    """

    id: int
    secret: bytes = field(repr=False)
    header: str = "redox-signature"
    hash: Literal["sha256", "sha384", "sha512"] = "sha256"
    encoding: Literal["hex", "base64", "base64url"] = "base64"
    prefix: str = ""
    timestamp_header: str | None = None
    tolerance: int = 300
    expires_at: datetime | None = None
    revoked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class JwtCredential:
    """Signed tokens that Redox presents, and what they must be. `subject` None: any that the issuer signs for us."""

    id: int
    rules: Rules
    subject: str | None = None
    expires_at: datetime | None = None
    revoked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GoogleCredential:
    """Tokens that Google signed for one account: its `email`, its `subject` (the account's number), or both.

    Google signs for everybody, for whatever audience they ask for: only the account tells Redox from a stranger.
    """

    id: int
    rules: Rules
    email: str | None = None
    subject: str | None = None
    expires_at: datetime | None = None
    revoked: bool = False

    def __post_init__(self) -> None:
        if not self.email and not self.subject:
            raise ConfigurationError(
                "kind google needs the e-mail or the subject of the account: anybody can have a "
                "token from Google for your audience"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """What a client of our token endpoint may ask for, and how it asks (Redox: the fields of its OAuth strategies).

    `names`: parameter → the name under which Redox was told to send it, where it is another. `audience`: the only one
    that a client may name, if it names one; None: any. `scopes`: what a client may ask for, and what it gets when it
    asks for none. `lifetime`: seconds of a token.
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
class OAuthCredential:
    """A client with a secret, kept as HMAC-SHA256 under `key`.

    `token_keys` sign and prove our access tokens; the first signs.
    """

    id: int
    client: Client
    digest: bytes = field(repr=False)
    key: bytes = field(repr=False)
    token_keys: tuple[VerifyingKey, ...] = field(repr=False)
    expires_at: datetime | None = None
    revoked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SmartCredential:
    """A client that proves itself by a signed assertion (RFC 7523): iss = sub = its id, aud = our token URL."""

    id: int
    client: Client
    rules: Rules
    token_keys: tuple[VerifyingKey, ...] = field(repr=False)
    expires_at: datetime | None = None
    revoked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SigV4Credential:
    """An access key that signs requests (AWS Signature Version 4), for one region and service.

    `unsigned_payload`: whether a request may leave its body out of the signature. `hosts`: the values of the Host
    header, in lower case, that it may be signed for; empty: any.
    """

    id: int
    access_key: str
    secret: bytes = field(repr=False)
    region: str
    service: str
    session_token: bytes | None = field(default=None, repr=False)
    unsigned_payload: bool = False
    hosts: tuple[str, ...] = ()
    expires_at: datetime | None = None
    revoked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MtlsCredential:
    """A client certificate, as a proxy that checked it reports it; every pin that is not None must hold.

    `proxy` is whose headers are read. `secret` proves that they are the proxy's: it comes in `secret_header` (lower
    case). `fingerprint`: SHA-256 of the certificate, 32 bytes. `subject`: RFC 4514. `san`: one name, DNS or URI.
    """

    id: int
    proxy: Literal["nginx", "envoy", "aws-alb"]
    secret: bytes = field(repr=False)
    secret_header: str = "x-proxy-secret"  # noqa: S105 - a header's name
    subject: str | None = None
    san: str | None = None
    fingerprint: bytes | None = None
    expires_at: datetime | None = None
    revoked: bool = False

    def __post_init__(self) -> None:
        if self.subject is None and self.san is None and self.fingerprint is None:
            raise ConfigurationError(
                "kind mtls needs a subject, a SAN or a fingerprint: the authority that signed "
                "Redox's certificate has signed others"
            )


Credential = (
    TokenCredential
    | HmacCredential
    | JwtCredential
    | GoogleCredential
    | OAuthCredential
    | SmartCredential
    | SigV4Credential
    | MtlsCredential
)


def live(credential: Credential, now: datetime) -> bool:
    """Whether the credential may verify a request at `now`."""
    return not credential.revoked and (credential.expires_at is None or now < credential.expires_at)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subscription:
    """A handler bound to a destination, with what accepting and answering must know of it (`handlers enable` wrote it).

    `patterns` as in receiver.protocol.patterns. `acknowledge` is "after_commit" or "after_handling". `timeout` seconds.
    """

    id: int
    handler: str
    role: Literal["handler", "responder"]
    patterns: tuple[str, ...]
    ordering: Ordering = "source"
    patient_key: str | None = None
    acknowledge: Literal["after_commit", "after_handling"] = "after_commit"
    on_failure: Literal["dead", "hold"] = "dead"
    max_attempts: int = 10
    timeout: float = 60.0
    paused: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """One URL of ours, and everything that is judged by.

    `require`: alternatives, each a set of kinds that must all be verified; `kinds`: all of them; `holds`: of what types
    its credentials are, and until when one of them is live (None: for ever). `sources` maps normalised ids to whether
    they are enabled; the key None stands for messages that name no source.
    """

    id: int
    name: str
    environment: Environment
    enabled: bool
    require: tuple[frozenset[str], ...]
    sources_policy: SourcesPolicy = "registered"
    on_unknown_source: UnknownSourcePolicy = "reject"
    test_messages: TestPolicy = "accept"
    kinds: frozenset[str] = field(init=False, repr=False, compare=False)
    holds: tuple[tuple[type[Credential], datetime | None], ...] = field(init=False, repr=False, compare=False)
    credentials: tuple[Credential, ...] = field(default=(), repr=False)
    sources: Mapping[str | None, bool] = field(default_factory=dict)
    subscriptions: tuple[Subscription, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", frozenset().union(*self.require))
        until: dict[type[Credential], datetime | None] = {}
        for each in self.credentials:
            if not each.revoked:
                ends = until.get(type(each), each.expires_at)
                until[type(each)] = None if ends is None or each.expires_at is None else max(ends, each.expires_at)
        object.__setattr__(self, "holds", tuple(until.items()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Registry:
    """Every destination by name, at one version of the registry.

    `public_keys`: those that Redox proves our client assertions by, as JWKs. `reload_after`: seconds after which it is
    to be loaded again, also without a new version, since public keys that were fetched get too old, or are.
    """

    version: int
    destinations: Mapping[str, Destination]
    public_keys: tuple[Mapping[str, str], ...] = ()
    reload_after: float = math.inf


def default_test_policy(environment: Environment) -> TestPolicy:
    """Development is for tests; elsewhere a message marked as a test is kept, not dispatched, unless told otherwise."""
    return "accept" if environment == "development" else "quarantine"
