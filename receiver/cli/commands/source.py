"""The command group `source`: manages the sources whose messages are accepted.

Must not print a command to paste with a value that is not in the format of an id: the sender controls the value.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click

from receiver.cli import output
from receiver.cli.options import example, json_option, limit_option, since_option
from receiver.cli.session import opened
from receiver.storage.operations import queries

COLUMNS: Final = ("destination", "source_id", "name", "enabled", "created_at")
REFUSED: Final = ("destination", "source_id", "reason", "count", "last_at")
# The period of --refused without --since.
DEFAULT_PERIOD: Final = timedelta(days=30)


@click.group()
def source() -> None:
    """Manage the sources whose messages are accepted, by their id at Redox."""


def _which(source_id: str | None, none: bool) -> str | None:
    if (source_id is None) != none:
        raise click.UsageError("give a SOURCE_ID, or --none for messages without a source")
    return source_id


none_option = click.option("--none", "none", is_flag=True, help="Messages without a source, instead of a SOURCE_ID.")


@source.command(
    epilog=example("source add lab 7ce6f387-c33c-417d-8682-81e83628cbd9 --name 'North Clinic'", "source add lab --none")
)
@click.argument("destination")
@click.argument("source_id", required=False)
@none_option
@click.option("--name", metavar="TEXT", help="A name for operators. Default: none.")
@json_option
def add(destination: str, source_id: str | None, *, none: bool, name: str | None, as_json: bool) -> None:
    """Accept messages of SOURCE_ID at DESTINATION, also after `source disable`."""
    source_id = _which(source_id, none)
    with opened() as session:
        number = session.registration.add_source(destination, source_id, datetime.now(UTC), name=name)
        with session.engine.connect() as connection:
            found = next(each for each in queries.sources(connection, destination=destination) if each["id"] == number)
    output.row(found, as_json=as_json)


@source.command("list", epilog=example("source list lab", "source list --refused --since 2h"))
@click.argument("destination", required=False)
@click.option(
    "--refused", is_flag=True, help="List unknown sources that were refused, with the command that adds each."
)
@since_option
@limit_option
@output.columns_option
@json_option
def list_(destination: str | None, *, refused: bool, since: datetime | None, limit: int, as_json: bool) -> None:
    """List registered sources (only those of DESTINATION if given); with --refused, unknown sources."""
    if since is not None and not refused:
        raise click.UsageError("--since requires --refused")
    with opened() as session, session.engine.connect() as connection:
        if not refused:
            found = queries.sources(connection, destination=destination)[:limit]
            output.rows(
                found,
                COLUMNS,
                as_json=as_json,
                nothing=(
                    "no source is registered: `redox-receiver source add DESTINATION SOURCE_ID` adds one, and "
                    "`redox-receiver source list --refused` lists those that were refused"
                ),
            )
            return
        seen = queries.refused_sources(
            connection, destination=destination, limit=limit, since=since or datetime.now(UTC) - DEFAULT_PERIOD
        )
    found = [each | {"add": each["add"] and f"redox-receiver source add {each['add']}"} for each in seen]
    back = "" if since else f" in the last {DEFAULT_PERIOD.days} days: use --since for a longer period"
    output.rows(
        found if as_json else [each | {"source_id": _shown(each)} for each in found],
        REFUSED,
        as_json=as_json,
        nothing=f"no unknown source was refused{back}",
    )
    if not as_json:
        for line in dict.fromkeys(each["add"] for each in found if each["add"]):
            click.echo(line)


def _shown(seen: Mapping[str, Any]) -> str | None:
    if seen["several"]:
        return "(many, not listed separately)"
    return seen["source_id"] or (seen["source_digest"] and "(not a valid id)")


@source.command(epilog=example("source disable lab 7ce6f387-c33c-417d-8682-81e83628cbd9"))
@click.argument("destination")
@click.argument("source_id", required=False)
@none_option
@json_option
def disable(destination: str, source_id: str | None, *, none: bool, as_json: bool) -> None:
    """Stop accepting messages of SOURCE_ID at DESTINATION."""
    source_id = _which(source_id, none)
    with opened() as session:
        session.registration.disable_source(destination, source_id, datetime.now(UTC))
    output.row({"destination": destination, "source_id": source_id, "enabled": False}, as_json=as_json)
