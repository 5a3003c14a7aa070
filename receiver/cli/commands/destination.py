"""The command group `destination`: manages the URLs that Redox posts to.

Must not store a verification token, only its digest. A new token is shown once.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import click

from receiver.cli import output
from receiver.cli.options import SECRET_FILE, Span, example, json_option, new_file, options, read_secret
from receiver.cli.session import opened
from receiver.protocol.registry import Environment, default_test_policy
from receiver.storage.operations import queries
from receiver.storage.registry.credentials import new_token

COLUMNS: Final = ("name", "environment", "enabled", "require", "sources_policy", "on_unknown_source", "test_messages")


def path(name: str) -> str:
    """The URL path that Redox posts to."""
    return f"/redox/{name}"


@click.group()
def destination() -> None:
    """Manage the URLs that Redox posts to, each with its credentials, sources, policies and handlers."""


# Options of both `add` and `set`. An option that is not given is None.
_policies = options(
    click.option(
        "--environment",
        type=click.Choice(["development", "staging", "production"]),
        help="Redox environment of the destination.  [default of `add`: development]",
    ),
    click.option(
        "--require",
        multiple=True,
        metavar="KIND[+KIND]",
        help="Kinds of credentials that a request must present, joined by +. Repeat it for alternatives.  "
        "[default of `add`: token]",
    ),
    click.option(
        "--sources",
        "sources_policy",
        type=click.Choice(["registered", "any"]),
        help="Accept messages only from registered sources, or from any.  [default of `add`: registered]",
    ),
    click.option(
        "--on-unknown-source",
        type=click.Choice(["reject", "quarantine"]),
        help="What to do with messages from unknown sources. Redox pauses the feed after reject.  "
        "[default of `add`: reject]",
    ),
    click.option(
        "--test-messages",
        type=click.Choice(["accept", "quarantine", "reject"]),
        help="What to do with test messages (Meta.Test).  [default of `add`: accept in development, else quarantine]",
    ),
    click.option(
        "--reply-with",
        metavar="API_KEY",
        help="API key with which handlers call Redox; an empty name removes it.  [default of `add`: none]",
    ),
)


@destination.command(
    epilog=example(
        "destination add lab --environment production --token-out lab.token",
        "destination add lab --require hmac+token --require token --json",
    )
)
@click.argument("name")
@_policies
@click.option(
    "--token-file",
    type=SECRET_FILE,
    metavar="FILE",
    help="Read the verification token from FILE (-: stdin). Default: generate one.",
)
@click.option(
    "--token-out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the generated verification token to the new FILE (mode 0600) instead of printing it.",
)
@json_option
def add(name: str, *, token_file: Path | None, token_out: Path | None, as_json: bool, **given: Any) -> None:
    """Add destination NAME and generate its verification token, which is shown only now.

    Enter the token in the Redox dashboard, with your public URL followed by the `path` that is printed.
    """
    if token_file is not None and token_out is not None:
        raise click.UsageError("--token-file reads an existing token, --token-out writes a new one: use one of them")
    environment: Environment = given["environment"] or "development"
    values: dict[str, Any] = {
        "environment": environment,
        "require": list(given["require"]) or ["token"],
        "sources_policy": given["sources_policy"] or "registered",
        "on_unknown_source": given["on_unknown_source"] or "reject",
        "test_messages": given["test_messages"] or default_test_policy(environment),
        "reply_with": given["reply_with"] or None,
    }
    token = new_token() if token_file is None else read_secret(token_file)
    with opened() as session, new_file(token_out, token.encode()):
        number = session.registration.add_destination(name, datetime.now(UTC), token=token, **values)
    shown = token if token_file is None and token_out is None else None
    found = {"name": name, "path": path(name), "verification_token": shown, "id": number, **values}
    output.row(
        found if as_json else found | {"verification_token": shown or f"(in {token_out or token_file})"},
        as_json=as_json,
    )


@destination.command(
    "set", epilog=example("destination set lab --test-messages quarantine", "destination set lab --expect-every 10m")
)
@click.argument("name")
@_policies
@click.option(
    "--expect-every",
    type=Span(),
    metavar="DURATION",
    help="Expect a message at least every DURATION (10m, 2h): `status` reports a longer silence. Default: automatic.",
)
@click.option(
    "--expect-none",
    is_flag=True,
    help="Return to the default: `status` derives the expected interval from past messages.",
)
@json_option
def change(name: str, *, expect_every: timedelta | None, expect_none: bool, as_json: bool, **given: Any) -> None:
    """Change the given settings of destination NAME. Others keep their value."""
    if expect_every is not None and expect_none:
        raise click.UsageError("--expect-every and --expect-none contradict each other")
    values = {column: list(value) if column == "require" else value for column, value in given.items() if value}
    if given["reply_with"] == "":
        values["reply_with"] = None
    if expect_every is not None or expect_none:
        values["expect_every"] = None if expect_every is None else int(expect_every.total_seconds())
    if not values:
        raise click.UsageError("nothing to change: give an option, see --help")
    _change(name, values, as_json=as_json)


@destination.command("list", epilog=example("destination list", "destination list --json"))
@output.columns_option
@json_option
def list_(*, as_json: bool) -> None:
    """List the destinations."""
    with opened() as session, session.engine.connect() as connection:
        found = queries.destinations(connection)
    output.rows(
        [_with_path(each) for each in found],
        COLUMNS,
        as_json=as_json,
        nothing="no destination yet: `redox-receiver destination add NAME` adds one, with its URL and token",
    )


@destination.command(epilog=example("destination show lab"))
@click.argument("name")
@json_option
def show(name: str, *, as_json: bool) -> None:
    """Show destination NAME with its credentials, sources and handlers."""
    with opened() as session, session.engine.connect() as connection:
        found = _with_path(queries.destination_named(connection, name))
        belongings = {
            "credentials": queries.credentials(connection, destination=name),
            "sources": queries.sources(connection, destination=name),
            "subscriptions": queries.subscriptions(connection, destination=name),
        }
    if as_json:
        output.document(found | belongings)
        return
    output.row(found, as_json=False)
    for title, columns, nothing in (
        (
            "credentials",
            ("id", "kind", "label", "live", "expires_at", "last_used_at"),
            f"no credential, so every request is refused: `redox-receiver credential add {name} --kind token`",
        ),
        (
            "sources",
            ("source_id", "name", "enabled"),
            "no source: see `redox-receiver source add --help` and `redox-receiver source list --refused`",
        ),
        (
            "subscriptions",
            ("handler", "role", "patterns", "enabled", "paused_at", "loaded"),
            f"no handler: messages are stored, not handled; `redox-receiver handlers enable NAME --destination {name}`",
        ),
    ):
        click.echo()
        output.rows(belongings[title], columns, as_json=False, nothing=nothing)


@destination.command(epilog=example("destination disable lab"))
@click.argument("name")
@json_option
def disable(name: str, *, as_json: bool) -> None:
    """Refuse every request to destination NAME. Its messages and deliveries are kept."""
    _change(name, {"enabled": False}, as_json=as_json)


@destination.command(epilog=example("destination enable lab"))
@click.argument("name")
@json_option
def enable(name: str, *, as_json: bool) -> None:
    """Accept messages at destination NAME again."""
    _change(name, {"enabled": True}, as_json=as_json)


def _change(name: str, values: dict[str, Any], *, as_json: bool) -> None:
    with opened() as session:
        session.registration.set_destination(name, datetime.now(UTC), values)
        with session.engine.connect() as connection:
            found = queries.destination_named(connection, name)
    output.row(_with_path(found), as_json=as_json)


def _with_path(found: dict[str, Any]) -> dict[str, Any]:
    return found | {"path": path(found["name"])}
