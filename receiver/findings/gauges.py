"""Gauges that are read from the database when Prometheus asks: backlog, feeds, credentials, processes, findings.

Must not scan what grows with the number of messages handled: the queries behind it read pending, dead and recent rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import structlog
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver import findings
from receiver.database.engine import describe
from receiver.findings.codes import CODES
from receiver.findings.view import View
from receiver.keyring import Keyring
from receiver.storage.operations import outbound_requests, queries

log: Final = structlog.get_logger(__name__)

PREFIX: Final = "redox_receiver_"


def read_gauges(engine: Engine, keyring: Keyring, data_dir: Path) -> list[Metric] | None:
    """Return every gauge as of now; None, after a log line, when the database does not answer or has another schema."""
    try:
        with engine.connect() as connection:
            return gauges(connection, keyring, data_dir)
    except SQLAlchemyError as exc:
        log.warning("metrics.not_read", error=describe(exc))
        return None


def gauges(connection: Connection, keyring: Keyring, data_dir: Path) -> list[Metric]:
    """Return every gauge as of now. Raises SQLAlchemyError."""
    view = findings.read(connection, keyring)
    space = shutil.disk_usage(data_dir if data_dir.exists() else data_dir.parent).free
    return [
        *_feeds(view),
        *_deliveries(view),
        *_credentials(view),
        *_outbox(view),
        *_processes(view),
        *_findings(view),
        _gauge("disk_free_bytes", "Free space of the file system of the data directory.", (), [((), space)]),
    ]


def _feeds(view: View) -> Iterator[Metric]:
    feeds, label = view.feeds, ("destination",)
    yield _gauge(
        "feed_last_accepted_timestamp_seconds",
        "When a message of the destination was last answered 200.",
        label,
        [((each["destination"],), _timestamp(each["last_200_at"])) for each in feeds if each["last_200_at"]],
    )
    yield _gauge(
        "feed_probably_paused",
        "1: an authentic request was refused, and nothing was answered 200 since.",
        label,
        [((each["destination"],), each["probably_paused"]) for each in feeds],
    )
    yield _gauge(
        "quarantined_messages",
        "Messages in quarantine.",
        label,
        [((each["destination"],), each["quarantined"]) for each in feeds],
    )
    yield _gauge(
        "held_lanes",
        "Lanes that are held after a dead delivery.",
        label,
        [((each["destination"],), len(each["held_lanes"])) for each in feeds],
    )


def _deliveries(view: View) -> Iterator[Metric]:
    both = ("destination", "handler")
    waiting = [
        ((feed["destination"], each["handler"]), each["pending"], each["oldest"])
        for feed in view.feeds
        for each in feed["waiting"]
    ]
    yield _gauge("pending_deliveries", "Deliveries that wait.", both, [(labels, count) for labels, count, _ in waiting])
    yield _gauge(
        "oldest_pending_timestamp_seconds",
        "When the oldest delivery that waits was created.",
        both,
        [(labels, _timestamp(oldest)) for labels, _, oldest in waiting],
    )
    dead: dict[tuple[str, ...], int] = {}
    for feed in view.feeds:
        for each in feed["dead"]:
            labels = (feed["destination"], each["handler"])
            dead[labels] = dead.get(labels, 0) + each["count"]
    yield _gauge("dead_deliveries", "Deliveries that are dead.", both, list(dead.items()))
    yield _gauge(
        "paused_handlers",
        "1 for each handler that is paused.",
        both,
        [((feed["destination"], each["handler"]), 1) for feed in view.feeds for each in feed["paused_handlers"]],
    )


def _credentials(view: View) -> Iterator[Metric]:
    yield _gauge(
        "credential_expires_timestamp_seconds",
        "When a credential expires. One that never expires is left out.",
        ("destination", "kind", "credential"),
        [
            ((each["destination"], each["kind"], str(each["id"])), _timestamp(each["expires_at"]))
            for each in queries.credentials(view.connection)
            if each["live"] and each["expires_at"] is not None
        ],
    )


def _outbox(view: View) -> Iterator[Metric]:
    yield _gauge(
        "outbox_problems",
        "Requests to Redox that are held or dead, or pending after a failure.",
        ("api_key", "state", "error_class"),
        [
            ((each["api_key"], each["state"], each["error_class"] or ""), each["count"])
            for each in outbound_requests.problems(view.connection)
        ],
    )
    yield _gauge(
        "outbox_pending",
        "Requests to Redox that wait to be sent.",
        (),
        [((), outbound_requests.pending(view.connection))],
    )


def _processes(view: View) -> Iterator[Metric]:
    alive: dict[tuple[str, ...], int] = {}
    for each in view.listeners:
        labels = (each["role"], each["host"])
        alive[labels] = alive.get(labels, 0) + each["processes"]
    for each in view.workers:
        labels = ("worker", each["host"])
        alive[labels] = alive.get(labels, 0) + int(each["alive"])
    yield _gauge("processes", "Running processes, by their heartbeats.", ("role", "host"), list(alive.items()))


def _findings(view: View) -> Iterator[Metric]:
    found: dict[tuple[str, ...], int] = dict.fromkeys(((code, "") for code in CODES), 0)
    for each in findings.collect(view):
        labels = (each.code, each.destination or "")
        found[labels] = found.get(labels, 0) + 1
    yield _gauge(
        "findings",
        "Conditions that `redox-receiver status` reports, by code. 0: the condition does not hold anywhere.",
        ("code", "destination"),
        list(found.items()),
    )


def _gauge(name: str, help_text: str, labels: Iterable[str], samples: list[tuple[tuple[str, ...], Any]]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, help_text, labels=list(labels))
    for values, value in samples:
        family.add_metric(list(values), float(value))
    return family


def _timestamp(time: datetime) -> float:
    return time.timestamp()
