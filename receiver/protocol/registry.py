"""What is registered, as one immutable value: destinations with their credentials, sources, subscriptions and policies.

`receiver.storage.registry` loads it and follows changes; here stands what a row means. May not look anything up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal

Environment = Literal["development", "staging", "production"]
TestPolicy = Literal["accept", "quarantine", "reject"]
UnknownSourcePolicy = Literal["reject", "quarantine"]
SourcesPolicy = Literal["registered", "any"]
Ordering = Literal["source", "patient", "none"]

# A shorter verification token could be guessed; the dashboard takes any length.
MIN_TOKEN_LENGTH: Final = 24


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


Credential = TokenCredential | HmacCredential


def live(credential: Credential, now: datetime) -> bool:
    """Whether the credential may open the door at `now`."""
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

    `require`: alternatives, each a set of kinds that must all be verified. `sources` maps normalised ids to whether
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
    credentials: tuple[Credential, ...] = field(default=(), repr=False)
    sources: Mapping[str | None, bool] = field(default_factory=dict)
    subscriptions: tuple[Subscription, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Registry:
    """Every destination by name, at one version of the registry."""

    version: int
    destinations: Mapping[str, Destination]


def default_test_policy(environment: Environment) -> TestPolicy:
    """Development is for tests; elsewhere a message marked as a test is kept, not dispatched, unless told otherwise."""
    return "accept" if environment == "development" else "quarantine"
