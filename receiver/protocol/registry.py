"""The registry as one immutable value: destinations with their credentials, sources, subscriptions and policies.

receiver.storage.registry.loader loads it and follows changes. Must not look anything up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

Environment = Literal["development", "staging", "production"]
TestPolicy = Literal["accept", "quarantine", "reject"]
UnknownSourcePolicy = Literal["reject", "quarantine"]
SourcesPolicy = Literal["registered", "any"]
Ordering = Literal["source", "patient", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Credential:
    """What verifies a request. Each kind has its own type, in receiver.protocol.verification."""

    id: int
    expires_at: datetime | None = None
    revoked: bool = False

    @property
    def stale(self) -> bool:
        """Whether its fetched keys are too old to be trusted."""
        return False


def live(credential: Credential, now: datetime) -> bool:
    """Return whether the credential may verify a request at `now`."""
    return not credential.revoked and (credential.expires_at is None or now < credential.expires_at)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subscription:
    """A handler enabled at a destination, with the parts of its declaration that the receiver needs.

    `patterns`: see receiver.protocol.patterns. `acknowledge`: "after_commit" or "after_handling". `timeout`: seconds.
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
    """One URL of the receiver, with everything that its requests are checked against.

    `require`: alternatives, each a set of kinds that must all be verified. `kinds`: all kinds in `require`. `holds`:
    the types of its credentials, each with the time until which one of them is live (None: no end). `sources`:
    normalized source id → whether it is enabled; the key None stands for messages that name no source.
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

    `public_keys`: JWKs with which Redox verifies the receiver's client assertions. `reload_after`: seconds after which
    it has to be loaded again, even without a new version, because fetched public keys become stale or are stale.
    """

    version: int
    destinations: Mapping[str, Destination]
    public_keys: tuple[Mapping[str, str], ...] = ()
    reload_after: float = math.inf


def default_test_policy(environment: Environment) -> TestPolicy:
    """Return the default: a development destination accepts test messages, others quarantine them."""
    return "accept" if environment == "development" else "quarantine"
