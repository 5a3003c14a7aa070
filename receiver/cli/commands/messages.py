"""`messages`: what came in, and what becomes of it once more.

May not show a payload but by `show --payload --reason`, which is in the audit before the first byte is out.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import click

from receiver.cli import output
from receiver.cli.correction_output import carry_out, correction
from receiver.cli.options import (
    MessageId,
    before_option,
    destination_option,
    dry_run_option,
    example,
    json_option,
    limit_option,
    new_file,
    nothing,
    optional_reason_option,
    options,
    page_note,
    reason_option,
    since_option,
    until_option,
)
from receiver.cli.session import opened
from receiver.states import MessageState
from receiver.storage.operations import queries
from receiver.storage.operations.disclosure import disclose
from receiver.storage.operations.queries import AuditFilter, DeliveryFilter, MessageFilter

COLUMNS: Final = ("id", "received_at", "destination", "kind", "source_id", "state", "quarantine_reason", "size")
STATES: Final = tuple(state.value for state in MessageState)
NONE: Final = (
    "no message yet: Redox posts them to the URLs of `redox-receiver destination list`, and "
    "`redox-receiver simulate` sends made-up ones"
)
# Of what belongs to one message, so much is shown; the lists of their own have more.
BELONGINGS: Final = 100


@click.group()
def messages() -> None:
    """What came in, byte for byte."""


_state = click.option("--state", type=click.Choice(STATES), help="In this state.")
_filters = options(
    destination_option,
    click.option("--kind", metavar="MODEL.EVENT", help="Of this kind, such as PatientAdmin.Arrival."),
    click.option("--source-id", metavar="ID", help="From this source."),
    click.option("--quarantine-reason", metavar="WORD", help="In quarantine for this reason."),
    since_option,
    until_option,
)


@messages.command(
    "list", epilog=example("messages list --destination lab --since 2h", "messages list --state quarantined --json")
)
@_state
@_filters
@before_option
@limit_option
@output.columns_option
@json_option
def list_(*, before: int | None, limit: int, as_json: bool, **filters: Any) -> None:
    """List messages, newest first."""
    with opened() as session, session.engine.connect() as connection:
        found = queries.messages(connection, MessageFilter(**filters), before=before, limit=limit)
    output.rows(found, COLUMNS, as_json=as_json, nothing=nothing(filters, NONE))
    page_note(found, limit)


@messages.command(
    epilog=example("messages show 8123", "messages show 8123 --payload --reason 'ticket 4711' --out 8123.json")
)
@click.argument("number", metavar="ID", type=MessageId())
@click.option("--payload", is_flag=True, help="Print the exact bytes that came, and nothing else; audited.")
@optional_reason_option("Why you look at them")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write them to a new FILE (0600) instead.",
)
@json_option
def show(number: int | UUID, *, payload: bool, reason: str | None, out: Path | None, as_json: bool) -> None:
    """Show message ID (or uuid), its deliveries and what the audit says of it; with --payload its bytes."""
    if payload:
        if reason is None or as_json:
            raise click.UsageError("--payload wants --reason, and prints the bytes alone (no --json)")
        _disclose(number, reason, out)
        return
    if reason is not None or out is not None:
        raise click.UsageError("--reason and --out go with --payload")
    with opened() as session, session.engine.connect() as connection:
        found = queries.message(connection, number)
        made = queries.deliveries(connection, DeliveryFilter(message_id=found["id"]), limit=BELONGINGS)
        told = queries.audit(connection, AuditFilter(message_uuid=found["uuid"]), limit=BELONGINGS)
    if as_json:
        output.document(found | {"deliveries": made, "audit_events": told})
        return
    output.row(found, as_json=False)
    click.echo()
    output.rows(
        made,
        ("id", "handler", "generation", "state", "attempts", "error_class", "lane"),
        as_json=False,
        nothing="no delivery: no handler was enabled for its kind; see `redox-receiver handlers list`",
    )
    click.echo()
    output.rows(told, ("id", "at", "action", "outcome", "reason", "actor"), as_json=False, nothing="no audit row")


def _disclose(number: int | UUID, reason: str, out: Path | None) -> None:
    with opened() as session:
        body = disclose(session.engine, session.keyring, number, datetime.now(UTC), actor=session.actor, reason=reason)
    if out is not None:
        with new_file(out, body):
            output.say(f"{len(body)} bytes in {out}")
    elif sys.stdout.isatty():
        # Whoever wrote the message does not get to write to this terminal.
        click.echo("\n".join(map(output.escaped, body.decode("utf-8", "backslashreplace").splitlines())))
    else:
        click.echo(body, nl=False)


@messages.command(
    epilog=example(
        "messages replay 8123 --reason 'register lost it'",
        "messages replay --kind Results.New --since 1d --handler results --dry-run --reason 'results is new'",
    )
)
@click.argument("ids", metavar="[ID]...", type=MessageId(), nargs=-1)
@_state
@_filters
@click.option("--handler", metavar="NAME", help="To this handler alone; else to all that are enabled now.")
@click.option(
    "--after", type=click.IntRange(0), default=0, metavar="ID", help="Only higher ids: to go on where one stopped."
)
@dry_run_option
@reason_option
@json_option
def replay(
    ids: tuple[int | UUID, ...],
    *,
    handler: str | None,
    after: int,
    dry_run: bool,
    reason: str,
    as_json: bool,
    **filters: Any,
) -> None:
    """Hand messages over anew, by ID or by filters, in the order of their arrival.

    They go to the end of their lanes, as a new generation with another idempotency key: what is newer was handled
    before them, and is counted here. `deliveries retry` keeps the place.
    """
    where = _chosen(ids, filters)
    with opened() as session:
        carry_out(
            correction(session).replay(
                where, datetime.now(UTC), handler=handler, reason=reason, dry_run=dry_run, after=after
            ),
            what="messages",
            verb="replayed",
            dry_run=dry_run,
            as_json=as_json,
            resume="For the rest, give the same command with --after {last}.",
        )


@messages.command(
    epilog=example(
        "messages release 8123 --reason 'source registered'",
        "messages release --quarantine-reason source_unknown --dry-run --reason 'registered'",
    )
)
@click.argument("ids", metavar="[ID]...", type=MessageId(), nargs=-1)
@_filters
@dry_run_option
@reason_option
@json_option
def release(ids: tuple[int | UUID, ...], *, dry_run: bool, reason: str, as_json: bool, **filters: Any) -> None:
    """Judge quarantined messages again, by what is registered now, and hand over those that are good.

    The others stay in quarantine: each is told with what is wrong with it.
    """
    where = _chosen(ids, filters)
    with opened() as session:
        carry_out(
            correction(session).release(where, datetime.now(UTC), reason=reason, dry_run=dry_run),
            what="messages",
            verb="released",
            dry_run=dry_run,
            as_json=as_json,
            resume="Give the same command again for the rest.",
        )


@messages.command(epilog=example("messages discard 8123 --reason 'a vendor test, agreed with them'"))
@click.argument("ids", metavar="[ID]...", type=MessageId(), nargs=-1)
@_filters
@dry_run_option
@reason_option
@json_option
def discard(ids: tuple[int | UUID, ...], *, dry_run: bool, reason: str, as_json: bool, **filters: Any) -> None:
    """Give quarantined messages up. Their rows and their bytes stay."""
    where = _chosen(ids, filters)
    with opened() as session:
        carry_out(
            correction(session).discard(where, datetime.now(UTC), reason=reason, dry_run=dry_run),
            what="messages",
            verb="discarded",
            dry_run=dry_run,
            as_json=as_json,
            resume="Give the same command again for the rest.",
        )


def _chosen(ids: tuple[int | UUID, ...], filters: dict[str, Any]) -> MessageFilter:
    where = MessageFilter(ids=ids, **filters)
    if queries.empty(where):
        raise click.UsageError("say which: give IDs, or filters such as --destination, --kind, --since")
    return where
