"""The command group `handlers`: manages the plugins that process messages.

Must not import a plugin that is not enabled or named: `list` reads only the entry points.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

import click

from receiver import findings
from receiver import settings as table
from receiver.cli import output
from receiver.cli.options import example, json_option
from receiver.cli.session import Session, opened
from receiver.protocol.patterns import matches
from receiver.samples.kinds import FHIR_CODED_EVENTS, FHIR_EVENTS, WIRE_NAMES
from receiver.storage.operations import queries
from receiver.worker import discovery, discovery_process

COLUMNS: Final = ("handler", "destination", "role", "patterns", "enabled", "paused_at", "found", "loaded", "problems")

_at_destination = click.option(
    "--destination", metavar="NAME", help="Only at this destination. Default: at all destinations."
)


@click.group()
def handlers() -> None:
    """Manage the plugins that process messages: found on this host, enabled at destinations, loaded by workers."""


@handlers.command("list", epilog=example("handlers list"))
@output.columns_option
@json_option
def list_(*, as_json: bool) -> None:
    """List handlers: `found` on this host, `enabled` at a destination, `loaded` by a running worker.

    A handler that is not enabled anywhere is listed without being imported. `problems` lists the findings of `status`
    for the handler: not loaded, not started, failing, late.
    """
    with opened() as session, session.engine.connect() as connection:
        bound = queries.subscriptions(connection)
        plugins = discovery_process.declared_handlers((), session.settings.handlers)
        problems = list(findings.plugins.read(connection))
    origins = {each.name: each.origin for each in discovery.found()} | {
        name: each.origin for name, each in plugins.loaded.items()
    }
    rows = [each | {"found": each["handler"] in origins, "origin": origins.get(each["handler"])} for each in bound]
    unbound = sorted(origins.keys() - {each["handler"] for each in bound})
    rows += [
        dict.fromkeys(COLUMNS)
        | {"handler": name, "enabled": False, "found": True, "loaded": False, "origin": origins[name]}
        for name in unbound
    ]
    for row in rows:
        row["problems"] = [
            each.code
            for each in problems
            if each.details["handler"] == row["handler"] and each.destination in (None, row["destination"])
        ]
    output.rows(
        rows,
        COLUMNS,
        as_json=as_json,
        nothing="no handler is installed or enabled: install a "
        "package with handlers, or set RECEIVER_HANDLERS to a module of yours; README.md shows one",
    )
    for text in [each.text for each in problems] + [each.message for each in plugins.failures]:
        output.say(output.escaped(text))


@handlers.command(epilog=example("handlers check", "handlers check --no-database"))
@click.option(
    "--no-database",
    is_flag=True,
    help="Check every installed handler and RECEIVER_HANDLERS, without a database. Default: only if "
    "neither DATABASE_URL nor a keyring exists.",
)
@json_option
def check(*, no_database: bool, as_json: bool) -> None:
    """Import every handler that is enabled, or named in RECEIVER_HANDLERS, as a worker does when it starts.

    Exit status 1 if an import fails, or if two handlers would answer the same query. Warns about patterns that match no
    event type in Redox's documentation. Without a database, as in continuous integration, it imports every installed
    handler.
    """
    settings = table.load_settings()
    offline = no_database or (settings.database_url is None and not settings.keyring_path.exists())
    if offline:
        bound, names, missing = {}, {each.name for each in discovery.found()}, []
    else:
        with opened() as session, session.engine.connect() as connection:
            rows = [each for each in queries.subscriptions(connection) if each["enabled"]]
        names = {each["handler"] for each in rows}
        bound = {
            each["destination"]: [row["handler"] for row in rows if row["destination"] == each["destination"]]
            for each in rows
        }
        missing = rows
    plugins = discovery_process.declared_handlers(names, settings.handlers)
    specs = {
        destination: [plugins.loaded[name].spec for name in of if name in plugins.loaded]
        for destination, of in bound.items()
    }
    if offline:
        specs["(any destination)"] = [each.spec for each in plugins.loaded.values()]
    wrong = [each.message for each in plugins.failures]
    failed = {each.handler for each in plugins.failures}
    wrong += [
        f"{each['handler']} is enabled at {each['destination']}, but not installed on this host: install it, or "
        f"run `redox-receiver handlers disable {each['handler']} --destination {each['destination']}`"
        for each in missing
        if each["handler"] not in plugins.loaded.keys() | failed
    ]
    wrong += [sentence for *_, sentence in discovery.responder_conflicts(specs)]
    rows = [
        {"handler": name, "role": each.spec.role, "patterns": list(each.spec.patterns), "origin": each.origin}
        for name, each in plugins.loaded.items()
    ]
    output.rows(
        rows,
        ("handler", "role", "patterns", "origin"),
        as_json=as_json,
        nothing="no handler is enabled: `redox-receiver handlers enable NAME --destination D`",
    )
    for row in rows:
        for pattern in unknown_patterns(row["patterns"]):
            output.say(f"warning: {row['handler']}: Redox documents no event type {pattern}{_similar(pattern)}")
    for text in wrong:
        output.say(f"Error: {output.escaped(text)}")
    if wrong:
        click.get_current_context().exit(1)


def unknown_patterns(patterns: Iterable[str]) -> list[str]:
    """Return the patterns that match no event type in Redox's documentation."""
    known = [*WIRE_NAMES, *(f"FHIR.{event}" for event in (*FHIR_EVENTS, *FHIR_CODED_EVENTS))]
    return [each for each in patterns if not any(matches([each], kind) for kind in known)]


def _similar(pattern: str) -> str:
    near = difflib.get_close_matches(pattern, [*WIRE_NAMES, *(f"FHIR.{event}" for event in FHIR_EVENTS)], n=1)
    return f"; did you mean {near[0]}?" if near else ""


@handlers.command(epilog=example("handlers enable register --destination lab"))
@click.argument("name")
@click.option("--destination", required=True, metavar="NAME", help="The destination whose messages it processes.")
@json_option
def enable(name: str, *, destination: str, as_json: bool) -> None:
    """Deliver new messages of a destination to handler NAME, or update it to its current declaration."""
    with opened() as session:
        spec = discovery_process.declared_handler(name, session.settings.handlers).spec
        session.registration.enable_handler(destination, spec, datetime.now(UTC))
        _show(session, name, destination, as_json=as_json)


@handlers.command(epilog=example("handlers disable register --destination lab"))
@click.argument("name")
@click.option(
    "--destination", required=True, metavar="NAME", help="The destination whose messages it no longer processes."
)
@json_option
def disable(name: str, *, destination: str, as_json: bool) -> None:
    """Create no new deliveries for handler NAME. Pending ones wait until it is enabled again."""
    with opened() as session:
        session.registration.disable_handler(destination, name, datetime.now(UTC))
        _show(session, name, destination, as_json=as_json)


@handlers.command(epilog=example("handlers pause register", "handlers pause register --destination lab"))
@click.argument("name")
@_at_destination
@json_option
def pause(name: str, *, destination: str | None, as_json: bool) -> None:
    """Pause handler NAME. Its deliveries wait in order until `handlers resume`."""
    with opened() as session:
        session.registration.pause_handler(name, datetime.now(UTC), destination=destination, reason="operator")
        _show(session, name, destination, as_json=as_json)


@handlers.command(epilog=example("handlers resume register"))
@click.argument("name")
@_at_destination
@json_option
def resume(name: str, *, destination: str | None, as_json: bool) -> None:
    """Resume handler NAME, even if the receiver has paused it."""
    with opened() as session:
        session.registration.resume_handler(name, datetime.now(UTC), destination=destination)
        _show(session, name, destination, as_json=as_json)


def _show(session: Session, name: str, destination: str | None, *, as_json: bool) -> None:
    with session.engine.connect() as connection:
        found = queries.subscriptions(connection, destination=destination)
    shown = [each for each in COLUMNS if each not in ("found", "problems")]
    output.rows([each for each in found if each["handler"] == name], shown, as_json=as_json, nothing="")
