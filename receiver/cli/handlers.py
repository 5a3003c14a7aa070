"""`handlers`: the plugins that messages are handed to.

May not import a plugin that nobody asked for: `list` knows them by their entry points alone.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import click

from receiver.cli import output
from receiver.cli.options import destination_option, example, json_option
from receiver.cli.session import Session, opened
from receiver.errors import ConfigurationError
from receiver.handlers import discovery
from receiver.storage import reading
from receiver.storage.registration import HandlerSpec

COLUMNS: Final = ("handler", "destination", "role", "patterns", "enabled", "paused_at", "found", "loaded")


@click.group()
def handlers() -> None:
    """The plugins that messages are handed to: found on this host, enabled at destinations, loaded by workers."""


@handlers.command("list", epilog=example("handlers list"))
@output.columns_option
@json_option
def list_(*, as_json: bool) -> None:
    """List handlers: `found` on this host, `enabled` at a destination, `loaded` by a live worker.

    What is found but not enabled anywhere is listed without being imported.
    """
    with opened() as session, session.engine.connect() as connection:
        bound = reading.subscriptions(connection)
        developing = discovery.load((), session.settings.handlers)
    origins = {each.name: each.origin for each in discovery.found()} | {
        name: each.origin for name, each in developing.items()}
    rows = [each | {"found": each["handler"] in origins, "origin": origins.get(each["handler"])} for each in bound]
    unbound = sorted(origins.keys() - {each["handler"] for each in bound})
    rows += [dict.fromkeys(COLUMNS) | {"handler": name, "enabled": False, "found": True, "loaded": False,
                                       "origin": origins[name]} for name in unbound]
    output.rows(rows, COLUMNS, as_json=as_json, nothing="no handler is installed or enabled: install a "
                "package that has some, or name a module of yours in RECEIVER_HANDLERS; README.md shows one")


@handlers.command(epilog=example("handlers check"))
@json_option
def check(*, as_json: bool) -> None:
    """Import every handler that is enabled, or named in RECEIVER_HANDLERS, as a worker does when it starts.

    Fails, naming it, when one cannot be imported, or two would answer one query.
    """
    with opened() as session:
        with session.engine.connect() as connection:
            bound = [each for each in reading.subscriptions(connection) if each["enabled"]]
        loaded = discovery.load({each["handler"] for each in bound}, session.settings.handlers)
    specs: dict[str, list[HandlerSpec]] = {}
    for each in bound:
        if each["handler"] not in loaded:
            raise ConfigurationError(
                f"{each['handler']} is enabled at {each['destination']}, but not on this host: install its plugin, or "
                f"run `redox-receiver handlers disable {each['handler']} --destination {each['destination']}`")
        specs.setdefault(each["destination"], []).append(loaded[each["handler"]].spec)
    discovery.check_responders(specs)
    output.rows([{"handler": name, "origin": each.origin, "role": each.spec.role, "patterns": list(each.spec.patterns)}
                 for name, each in loaded.items()], ("handler", "role", "patterns", "origin"), as_json=as_json,
                nothing="no handler is enabled: `redox-receiver handlers enable NAME --destination D`")


@handlers.command(epilog=example("handlers enable register --destination lab"))
@click.argument("name")
@click.option("--destination", required=True, metavar="NAME", help="Whose messages it gets.")
@json_option
def enable(name: str, *, destination: str, as_json: bool) -> None:
    """Hand the messages of a destination to handler NAME from now on; or bind it anew, as it is declared now."""
    with opened() as session:
        spec = discovery.load_one(name, session.settings.handlers).spec
        session.registration.enable_handler(destination, spec, datetime.now(UTC))
        _show(session, name, destination, as_json=as_json)


@handlers.command(epilog=example("handlers disable register --destination lab"))
@click.argument("name")
@click.option("--destination", required=True, metavar="NAME", help="Whose messages it gets no more.")
@json_option
def disable(name: str, *, destination: str, as_json: bool) -> None:
    """Make no new deliveries for handler NAME. Those that are pending wait until it is enabled again."""
    with opened() as session:
        session.registration.disable_handler(destination, name, datetime.now(UTC))
        _show(session, name, destination, as_json=as_json)


@handlers.command(epilog=example("handlers pause register", "handlers pause register --destination lab"))
@click.argument("name")
@destination_option
@json_option
def pause(name: str, *, destination: str | None, as_json: bool) -> None:
    """Run nothing of handler NAME until it is resumed: its deliveries wait, in order."""
    with opened() as session:
        session.registration.pause_handler(name, datetime.now(UTC), destination=destination, reason="operator")
        _show(session, name, destination, as_json=as_json)


@handlers.command(epilog=example("handlers resume register"))
@click.argument("name")
@destination_option
@json_option
def resume(name: str, *, destination: str | None, as_json: bool) -> None:
    """Let handler NAME run on, whoever paused it."""
    with opened() as session:
        session.registration.resume_handler(name, datetime.now(UTC), destination=destination)
        _show(session, name, destination, as_json=as_json)


def _show(session: Session, name: str, destination: str | None, *, as_json: bool) -> None:
    with session.engine.connect() as connection:
        found = reading.subscriptions(connection, destination=destination)
    output.rows([each for each in found if each["handler"] == name], [each for each in COLUMNS if each != "found"],
                as_json=as_json, nothing="")
