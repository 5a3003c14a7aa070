"""Checks of what is registered and what runs: credentials, plugins, workers, listeners, findings of `status`."""

from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import Connection

from receiver import findings
from receiver import settings as table
from receiver.cli.checks.host import check_listeners
from receiver.cli.checks.result import CheckResult
from receiver.findings.formatting import count
from receiver.keyring import Keyring
from receiver.settings import Settings
from receiver.storage.operations import queries
from receiver.storage.registry.handler_changes import HandlerSpec
from receiver.worker import discovery, discovery_process

# Findings of `status` that `check` replaces by closer checks of its own.
_OWN: Final = frozenset({"clock", "no_worker", "no_credential", "credential_expires"})
_ENDS_SOON: Final = timedelta(days=30)


def _credentials(connection: Connection, _: Keyring | None) -> CheckResult:
    """Check that each destination has live credentials of the kinds it requires."""
    live: dict[str, set[str]] = {}
    ending = []
    for each in queries.credentials(connection):
        if each["live"]:
            live.setdefault(each["destination"], set()).add(each["kind"])
            if each["expires_at"] is not None and each["expires_at"] < datetime.now(UTC) + _ENDS_SOON:
                ending.append(f"credential {each['id']} of {each['destination']} on {each['expires_at']:%Y-%m-%d}")
    closed = [
        each["name"]
        for each in queries.destinations(connection)
        if each["enabled"]
        and not any(set(kinds.split("+")) <= live.get(each["name"], set()) for kinds in each["require"])
    ]
    if closed:
        return CheckResult(
            name="credentials",
            state="bad",
            message=f"every request to {', '.join(closed)} is refused: no live credential of the kinds it requires",
            fix=f"redox-receiver credential add {closed[0]} --kind …",
        )
    if ending:
        return CheckResult(
            name="credentials",
            state="warn",
            message=f"expires soon: {'; '.join(ending)}",
            fix="redox-receiver credential add DESTINATION --kind …, then enter it at Redox",
        )
    return CheckResult(
        name="credentials",
        state="ok",
        message="every destination has the credentials it requires, for at least 30 days",
    )


def _plugins(connection: Connection, _: Keyring | None) -> CheckResult:
    """Import the enabled handlers on this host as a worker does."""
    bound = [each for each in queries.subscriptions(connection) if each["enabled"]]
    specs: dict[str, list[HandlerSpec]] = {}
    plugins = discovery_process.declared_handlers({each["handler"] for each in bound}, table.load_settings().handlers)
    for each in bound:
        if each["handler"] in plugins.loaded:
            specs.setdefault(each["destination"], []).append(plugins.loaded[each["handler"]].spec)
    wrong = [each.message for each in plugins.failures]
    wrong += [sentence for *_, sentence in discovery.responder_conflicts(specs)]
    if wrong:
        return CheckResult(name="plugins", state="bad", message="; ".join(wrong), fix="redox-receiver handlers check")
    message = count(len(plugins.loaded), "handler", "handlers") + " imported"
    return CheckResult(name="plugins", state="ok", message=message if plugins.loaded else "no handler is enabled")


def _workers(connection: Connection, _: Keyring | None) -> CheckResult:
    alive = [each for each in queries.workers(connection) if each["alive"]]
    wanted = {
        each["handler"] for each in queries.subscriptions(connection) if each["enabled"] and each["role"] == "handler"
    }
    missing = sorted(wanted - {name for each in alive for name in each["handlers"]})
    if wanted and not alive:
        return CheckResult(
            name="workers",
            state="bad",
            message="no delivery worker is alive: deliveries wait",
            fix="redox-receiver up, or redox-receiver worker",
        )
    if missing:
        return CheckResult(
            name="workers",
            state="bad",
            message=f"no live worker has loaded {', '.join(missing)}",
            fix="install the plugin or set RECEIVER_HANDLERS, then see `redox-receiver handlers list`",
        )
    return CheckResult(name="workers", state="ok", message=f"{len(alive)} alive")


def check_listening(settings: Settings, connection: Connection, _: Keyring | None) -> list[CheckResult]:
    """Check the addresses at which the processes of this host listen, or would listen."""
    running = [each for each in queries.listeners(connection) if each["alive"] and each["host"] == socket.gethostname()]
    found: list[CheckResult] = []
    for role, bind in (("receiver", settings.bind), ("admin", settings.admin_bind)):
        served = [each["address"] for each in running if each["role"] == role]
        found += check_listeners(
            {"receiver": [], "admin": [], role: served or [bind]},
            "listens at" if served else "does not run here; would listen at",
        )
    return found


def check_status(connection: Connection, keyring: Keyring | None) -> list[CheckResult]:
    """Return the findings of `status`."""
    return [
        CheckResult(
            name=each.code, state="bad" if each.severity == "error" else "warn", message=each.text, fix=each.fix
        )
        for each in findings.collect(findings.read(connection, keyring))
        if each.code not in _OWN
    ]


CHECKS: Final = (_credentials, _plugins, _workers)
