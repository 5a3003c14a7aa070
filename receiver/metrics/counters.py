"""Counters and histograms that this process adds to.

Must not take a label value from a message: callers pass registered names and fixed words.
"""

from __future__ import annotations

from functools import cache
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# Not the library's default registry, which also holds figures of one process alone.
REGISTRY: Final = CollectorRegistry()

REQUESTS: Final = Counter(
    "redox_receiver_requests",
    "Requests by outcome: accepted, duplicate, quarantined, unhandled, handshake, refused or unavailable; and reason.",
    ("destination", "outcome", "reason"),
    registry=REGISTRY,
)
ACCEPT_SECONDS: Final = Histogram(
    "redox_receiver_accept_seconds",
    "Time from the head of a request to the COMMIT of its message, without handlers.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
    registry=REGISTRY,
)
BATCH_MESSAGES: Final = Histogram(
    "redox_receiver_commit_batch_messages",
    "Messages that one transaction recorded.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    registry=REGISTRY,
)
SOURCE_LAST_MESSAGE: Final = Gauge(
    "redox_receiver_source_last_message_timestamp_seconds",
    "When a registered source last had a message accepted, since the receiver started.",
    ("destination", "source"),
    multiprocess_mode="max",
    registry=REGISTRY,
)
DELIVERIES: Final = Counter(
    "redox_receiver_delivery_attempts",
    "Attempts of handlers by outcome: succeeded, failed (tried again), deferred by the handler, or dead.",
    ("destination", "handler", "outcome"),
    registry=REGISTRY,
)
HANDLER_SECONDS: Final = Histogram(
    "redox_receiver_handler_seconds",
    "Run time of handlers that succeeded.",
    ("handler",),
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
    registry=REGISTRY,
)
OUTBOUND: Final = Counter(
    "redox_receiver_outbound_requests",
    "Requests of the outbox to Redox by API key and outcome.",
    ("api_key", "outcome"),
    registry=REGISTRY,
)

# A label lookup costs as much as the count itself.
_request = cache(REQUESTS.labels)
_source = cache(SOURCE_LAST_MESSAGE.labels)
_delivery = cache(DELIVERIES.labels)
_handler = cache(HANDLER_SECONDS.labels)
_outbound = cache(OUTBOUND.labels)


def count_request(destination: str | None, outcome: str, reason: str | None = None) -> None:
    """Count a request. `destination`: a registered one; None: the path names none."""
    _request(destination or "", outcome, reason or "").inc()


def observe_accept(seconds: float) -> None:
    """Record how long it took to accept a message."""
    ACCEPT_SECONDS.observe(seconds)


def observe_batch(messages: int) -> None:
    """Record how many messages one transaction holds."""
    BATCH_MESSAGES.observe(messages)


def source_seen(destination: str, source: str, at: float) -> None:
    """Record that a registered source had a message accepted `at` (seconds since 1970)."""
    _source(destination, source).set(at)


def count_attempt(destination: str, handler: str, outcome: str, seconds: float | None) -> None:
    """Count an attempt of a handler, and its run time where it is known."""
    _delivery(destination, handler, outcome).inc()
    if seconds is not None:
        _handler(handler).observe(seconds)


def count_outbound(api_key: str, outcome: str) -> None:
    """Count a request of the outbox."""
    _outbound(api_key, outcome).inc()
