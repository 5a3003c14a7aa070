"""Queries for the report of a patient: the messages that name the patient, and all that happened to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection

from receiver.storage.operations.queries.rows import Mappings, mappings_of

# One row for each thing that happened to a message with the patient. Attempts of deliveries are used, because
# `deliveries retry` counts from zero. A request's recipients are in the audit row of its first attempt.
_TOUCHED: Final = """
WITH m AS MATERIALIZED (
    SELECT m.id, m.received_at, m.uuid, m.source_id, m.kind, m.state, m.peer, t.name AS destination
    FROM (SELECT DISTINCT message_id, received_at FROM patient_digests WHERE digest = ANY(%(digests)s::bytea[])) f
    JOIN messages m ON m.id = f.message_id AND m.received_at = f.received_at
    JOIN destinations t ON t.id = m.destination_id),
events AS (
    SELECT m.received_at AS at, 'received' AS event, coalesce('source:' || m.source_id, m.peer) AS actor,
           m.state AS outcome, NULL AS recipient, 'messages:' || m.id AS subject, m.uuid
    FROM m
    UNION ALL
    SELECT a.ended_at, 'handled', 'handler:' || d.handler, a.outcome, NULL, 'deliveries:' || d.id, m.uuid
    FROM m JOIN deliveries d ON d.message_id = m.id AND d.received_at = m.received_at
    JOIN delivery_attempts a ON a.delivery_id = d.id AND a.received_at = d.received_at
    UNION ALL
    SELECT d.started_at, 'handled', 'handler:' || d.handler, 'running', NULL, 'deliveries:' || d.id, m.uuid
    FROM m JOIN deliveries d ON d.message_id = m.id AND d.received_at = m.received_at
    WHERE d.started_at IS NOT NULL
    UNION ALL
    SELECT a.at,
           CASE WHEN a.action LIKE '%%.disclose' THEN 'viewed' WHEN a.action = 'message.receive' THEN 'received'
                WHEN a.action = 'query.answer' THEN 'answered' ELSE a.action END,
           CASE WHEN a.action = 'message.receive' THEN coalesce('source:' || m.source_id, a.peer)
                WHEN a.action = 'query.answer' THEN coalesce('handler:' || (a.detail::jsonb ->> 'responder'), a.actor)
                ELSE a.actor END,
           a.outcome,
           CASE WHEN a.action = 'query.answer' THEN coalesce('source:' || m.source_id, a.peer) END,
           coalesce(a.subject, 'messages:' || m.id), m.uuid
    FROM m JOIN audit_events a ON a.message_uuid = m.uuid
    WHERE NOT (a.action = 'message.receive' AND a.outcome <> 'duplicate')
      AND a.action NOT IN ('outbound.send', 'outbound.query', 'outbound.fhir', 'outbound.upload')
    UNION ALL
    SELECT coalesce(r.finished_at, r.started_at, r.created_at),
           CASE WHEN r.attempts > 0 OR r.lane IS NULL THEN 'sent' ELSE 'queued' END,
           r.created_by, r.state,
           (SELECT string_agg(DISTINCT recipient.name, ', ')
            FROM audit_events a, jsonb_array_elements_text(a.detail::jsonb -> 'to') AS recipient(name)
            WHERE a.message_uuid = r.message_uuid AND a.subject = 'outbound_requests:' || r.id
              AND a.outcome = 'begun'),
           'outbound_requests:' || r.id, m.uuid
    FROM m JOIN outbound_requests r ON r.message_uuid = m.uuid
    UNION ALL
    SELECT a.at, 'viewed', a.actor, a.outcome, NULL, 'audit_events:' || a.id, NULL
    FROM audit_events a
    WHERE a.action = 'audit.report' AND a.detail::jsonb ->> 'patient' = %(patient)s)
SELECT e.at, e.event, e.actor, e.outcome, m.destination, m.kind, m.source_id, e.recipient, e.subject,
       m.id AS message_id, e.uuid AS message_uuid
FROM events e LEFT JOIN m USING (uuid)
ORDER BY e.at, m.id, e.subject"""

_SOURCES: Final = """
SELECT source_id, count(*) FILTER (WHERE kind IS NULL) AS unreadable,
       count(*) FILTER (WHERE kind IS NOT NULL AND patients_indexed_at IS NULL) AS not_indexed
FROM messages GROUP BY source_id"""
_OLDEST: Final = """
SELECT (SELECT received_at FROM messages ORDER BY id LIMIT 1) AS message,
       (SELECT received_at FROM payloads ORDER BY message_id LIMIT 1) AS payload"""


def touched(connection: Connection, digests: Sequence[bytes], patient: str) -> Mappings:
    """Return what happened to the messages whose patient has one of these digests, oldest first.

    `patient`: the digest that earlier reports of this patient recorded.
    """
    return mappings_of(connection, _TOUCHED, {"digests": list(digests), "patient": patient})


def message_sources(connection: Connection) -> Mappings:
    """Return each source id of the stored messages, with how many of them are unreadable, and not indexed yet."""
    return mappings_of(connection, _SOURCES, {})


def oldest_payload(connection: Connection) -> dict[str, object]:
    """Return when the oldest message and the oldest payload were received: `message`, `payload`; None without any."""
    return mappings_of(connection, _OLDEST, {})[0]
