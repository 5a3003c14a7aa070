"""Queries of feeds: what each destination receives, refuses and has pending."""

from __future__ import annotations

from collections import defaultdict
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, Table, and_, cast, false, func, or_, select
from sqlalchemy.dialects.postgresql import JSONB

from receiver.states import DeliveryState, LaneState, MessageState
from receiver.storage import schema
from receiver.storage.evidence.audit_log import AUTHENTIC_REASONS
from receiver.storage.operations.queries.registry_queries import destinations
from receiver.storage.operations.queries.rows import LATEST, RECENT, Mappings, loaded, mappings, mappings_of


def feed_status(connection: Connection) -> Mappings:
    """Return the state of each destination's feed. Keys:

    destination, environment, enabled;
    last_200_at: when a message was last answered 200;
    last_refusal_at, last_refusal_reason, last_refusal_status (null in a summed-up row), last_refusal_authentic;
    probably_paused: the last refused request came from a holder of a credential, and nothing was answered 200 since
    (queries do not count: Redox does not repeat them, and they pause nothing);
    backlog, oldest_pending_at: pending deliveries;
    waiting: the same for each handler, as [{handler, pending, oldest, loaded (by a running worker), never_tried,
    oldest_never_tried}];
    held_lanes: [lane]; paused_handlers: [{handler, paused_at, pause_reason}];
    unserved: [{handler, pending}] that no live worker has loaded;
    dead: [{handler, error_class, count, last_at}];
    quarantined, quarantined_bytes, quarantine: [{quarantine_reason, count, bytes}].
    """
    backlog, dead, held = _backlog(connection), _dead(connection), _held(connection)
    paused, quarantine = _paused(connection), _quarantine(connection)
    return [
        {
            "destination": each["name"],
            "environment": each["environment"],
            "enabled": each["enabled"],
            **_answers(connection, each["name"]),
            "backlog": sum(row["pending"] for row in backlog[each["id"]]),
            "oldest_pending_at": min((row["oldest"] for row in backlog[each["id"]]), default=None),
            "waiting": backlog[each["id"]],
            "held_lanes": [row["lane"] for row in held[each["id"]]],
            "paused_handlers": paused[each["id"]],
            "unserved": [
                {"handler": row["handler"], "pending": row["pending"]}
                for row in backlog[each["id"]]
                if not row["loaded"]
            ],
            "dead": dead[each["id"]],
            "quarantined": sum(row["count"] for row in quarantine[each["id"]]),
            "quarantined_bytes": sum(row["bytes"] for row in quarantine[each["id"]]),
            "quarantine": quarantine[each["id"]],
        }
        for each in destinations(connection)
    ]


def _answers(connection: Connection, destination: str) -> dict[str, Any]:
    """Return the last 200, the last refusal, and whether Redox has probably paused."""
    table = schema.audit_events
    detail = cast(table.c.detail, JSONB)
    status, query = detail["status"].as_integer(), func.coalesce(detail["query"].as_boolean(), false())
    authentic = or_(table.c.actor == "redox", table.c.reason.in_(AUTHENTIC_REASONS))

    def latest(*conditions: ColumnElement[bool]) -> Any:
        these = and_(table.c.destination == destination, *conditions)
        newest = select(table.c.id).where(these).order_by(table.c.id.desc()).limit(1).scalar_subquery()
        return connection.execute(
            select(table.c.at, table.c.reason, status.label("status"), authentic.label("authentic"))
            .where(these, table.c.id > newest - LATEST)
            .order_by(table.c.at.desc())
            .limit(1)
        ).one_or_none()

    refused = table.c.action == "message.refuse"
    good, bad, ours = latest(table.c.action == "message.receive"), latest(refused), latest(refused, authentic, ~query)
    return {
        "last_200_at": good and good.at,
        "last_refusal_at": bad and bad.at,
        "last_refusal_reason": bad and bad.reason,
        "last_refusal_status": bad and bad.status,
        "last_refusal_authentic": bool(bad and bad.authentic),
        "probably_paused": ours is not None and (good is None or ours.at > good.at),
    }


def recent_refusals(connection: Connection, destination: str | None) -> Mappings:
    """Return recently refused requests for a destination; None: those that name an unknown destination.

    For each subject (`message`, `token`) and reason: status; `since` (how many after the last accepted one, within a
    day) with since_first_at and since_last_at; `window` (how many within RECENT), and accepted_window (how many were
    accepted then); `mixed`: a refusal came after one of the last two accepted; last_accepted_at. Reads only the newest
    rows of the audit log, and so counts no further back.
    """
    return mappings_of(connection, _RECENT_REFUSALS, {"destination": destination, "rows": LATEST, "recent": RECENT})


_RECENT_REFUSALS: Final = """
WITH newest AS (
    SELECT action, reason, at, count, detail::jsonb ->> 'status' AS status FROM audit_events
    WHERE destination IS NOT DISTINCT FROM %(destination)s ORDER BY id DESC LIMIT %(rows)s),
requests AS (
    SELECT split_part(action, '.', 1) AS subject, action IN ('message.refuse', 'token.refuse') AS refused, reason, at,
           count, status
    FROM newest WHERE action IN ('message.receive', 'message.refuse', 'token.issue', 'token.refuse')
      AND at > now() - interval '1 day'),
accepted AS (
    SELECT subject, max(at) AS last_accepted_at, (array_agg(at ORDER BY at DESC))[2] AS before_last,
           sum(count) FILTER (WHERE at > now() - %(recent)s) AS accepted_window
    FROM requests WHERE NOT refused GROUP BY subject)
SELECT r.subject, r.reason, max(r.status)::integer AS status, a.last_accepted_at,
       coalesce(sum(r.count) FILTER (WHERE r.at > s.after), 0)::bigint AS since,
       min(r.at) FILTER (WHERE r.at > s.after) AS since_first_at,
       max(r.at) FILTER (WHERE r.at > s.after) AS since_last_at,
       coalesce(sum(r.count) FILTER (WHERE r.at > now() - %(recent)s), 0)::bigint AS "window",
       min(r.at) FILTER (WHERE r.at > now() - %(recent)s) AS window_first_at,
       max(r.at) FILTER (WHERE r.at > now() - %(recent)s) AS window_last_at,
       coalesce(a.accepted_window, 0)::bigint AS accepted_window,
       coalesce(bool_or(r.at > a.before_last), true) AS mixed
FROM requests r LEFT JOIN accepted a USING (subject)
CROSS JOIN LATERAL (SELECT coalesce(a.last_accepted_at, '-infinity') AS after) s
WHERE r.refused GROUP BY r.subject, r.reason, a.last_accepted_at, a.accepted_window
ORDER BY max(r.at) DESC"""


def _grouped(connection: Connection, query: Select[Any]) -> defaultdict[int, Mappings]:
    """Return the rows by their destination's id."""
    found: defaultdict[int, Mappings] = defaultdict(list)
    for row in mappings(connection, query):
        found[row.pop("destination_id")].append(row)
    return found


def _untried(table: Table) -> ColumnElement[bool]:
    return and_(table.c.attempts == 0, table.c.started_at.is_(None))


def _backlog(connection: Connection) -> defaultdict[int, Mappings]:
    table = schema.deliveries
    return _grouped(
        connection,
        select(
            table.c.destination_id,
            table.c.handler,
            func.count().label("pending"),
            func.min(table.c.created_at).label("oldest"),
            loaded(table.c.handler).label("loaded"),
            func.count().filter(_untried(table)).label("never_tried"),
            func.min(table.c.created_at).filter(_untried(table)).label("oldest_never_tried"),
        )
        .where(table.c.state == DeliveryState.PENDING)
        .group_by(table.c.destination_id, table.c.handler)
        .order_by(table.c.handler),
    )


def _dead(connection: Connection) -> defaultdict[int, Mappings]:
    table = schema.deliveries
    return _grouped(
        connection,
        select(
            table.c.destination_id,
            table.c.handler,
            table.c.error_class,
            func.count().label("count"),
            func.max(table.c.finished_at).label("last_at"),
        )
        .where(table.c.state == DeliveryState.DEAD)
        .group_by(table.c.destination_id, table.c.handler, table.c.error_class)
        .order_by(func.count().desc()),
    )


def _held(connection: Connection) -> defaultdict[int, Mappings]:
    table = schema.lanes
    return _grouped(
        connection,
        select(table.c.destination_id, table.c.lane).where(table.c.state == LaneState.HELD).order_by(table.c.lane),
    )


def _paused(connection: Connection) -> defaultdict[int, Mappings]:
    table = schema.subscriptions
    return _grouped(
        connection,
        select(table.c.destination_id, table.c.handler, table.c.paused_at, table.c.pause_reason)
        .where(table.c.paused_at.is_not(None), table.c.enabled)
        .order_by(table.c.handler),
    )


def _quarantine(connection: Connection) -> defaultdict[int, Mappings]:
    table = schema.messages
    return _grouped(
        connection,
        select(
            table.c.destination_id,
            table.c.quarantine_reason,
            func.count().label("count"),
            func.sum(table.c.size).label("bytes"),
        )
        .where(table.c.state == MessageState.QUARANTINED)
        .group_by(table.c.destination_id, table.c.quarantine_reason)
        .order_by(func.count().desc()),
    )


def feed_activity(connection: Connection, history: timedelta) -> dict[str, dict[str, Any]]:
    """Return when messages came to each destination within `history`. Destinations without messages are left out.

    Keys: first_at and last_at (to five minutes), and longest, the longest time without any.
    """
    return {row.pop("name"): row for row in mappings_of(connection, _ACTIVITY, {"history": history})}


_ACTIVITY: Final = """
SELECT d.name, min(slot) AS first_at, max(slot) AS last_at, coalesce(max(gap), '0') AS longest
FROM (SELECT destination_id, slot, slot - lag(slot) OVER (PARTITION BY destination_id ORDER BY slot) AS gap
      FROM feed_activity WHERE slot > now() - %(history)s) a JOIN destinations d ON d.id = a.destination_id
GROUP BY d.name"""
