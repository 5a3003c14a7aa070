"""Queries for operators: lists, single rows, and the state of feeds.

Must not write, nor return a digest, a secret or a sealed text, except from `payload`, `error_text` and `note`, whose
callers have audited it. Lists are newest first, one page at a time by id (`before`), because offsets would shift while
a list grows. Rows are dicts. Their keys are the tables' columns, with `destination` (its name) for `destination_id`.
"""

from __future__ import annotations

from receiver.storage.operations.queries.audit_queries import audit, note
from receiver.storage.operations.queries.delivery_queries import (
    deliveries,
    delivery,
    error_text,
    lanes,
    leased,
    pending,
)
from receiver.storage.operations.queries.feed_queries import feed_activity, feed_status, recent_refusals
from receiver.storage.operations.queries.filters import AuditFilter, DeliveryFilter, MessageFilter, empty
from receiver.storage.operations.queries.message_queries import message, messages, payload, recent_unhandled
from receiver.storage.operations.queries.process_queries import listeners, workers
from receiver.storage.operations.queries.registry_queries import (
    credentials,
    destination_named,
    destinations,
    keys,
    refused_sources,
    sources,
    subscriptions,
)
from receiver.storage.operations.queries.rows import RECENT, WORKER_SILENT, Mappings

__all__ = [
    "RECENT",
    "WORKER_SILENT",
    "AuditFilter",
    "DeliveryFilter",
    "Mappings",
    "MessageFilter",
    "audit",
    "credentials",
    "deliveries",
    "delivery",
    "destination_named",
    "destinations",
    "empty",
    "error_text",
    "feed_activity",
    "feed_status",
    "keys",
    "lanes",
    "leased",
    "listeners",
    "message",
    "messages",
    "note",
    "payload",
    "pending",
    "recent_refusals",
    "recent_unhandled",
    "refused_sources",
    "sources",
    "subscriptions",
    "workers",
]
