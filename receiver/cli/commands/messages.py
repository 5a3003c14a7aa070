"""The command group `messages`: lists and corrects received messages.

Must not show a payload, except by `show --payload --reason`, after an audit row.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import click

from receiver.cli import output
from receiver.cli.correction_output import carry_out, corrections, require_selection
from receiver.cli.options import (
    MessageId,
    correction_options,
    destination_option,
    example,
    json_option,
    list_options,
    new_file,
    nothing,
    optional_reason_option,
    options,
    page_note,
    since_option,
    until_option,
)
from receiver.cli.session import opened
from receiver.states import MessageState
from receiver.storage.operations import queries
from receiver.storage.operations.corrections.message_corrections import MessageCorrections
from receiver.storage.operations.disclosure import disclose
from receiver.storage.operations.queries import AuditFilter, DeliveryFilter, MessageFilter

COLUMNS: Final = ("id", "received_at", "destination", "kind", "source_id", "state", "quarantine_reason", "size")
STATES: Final = tuple(state.value for state in MessageState)
NONE: Final = (
    "no message yet: Redox posts them to the URLs of `redox-receiver destination list`, and "
    "`redox-receiver simulate` sends synthetic ones"
)
# The number of deliveries and audit rows that `show` prints. Their own lists print more.
RELATED_LIMIT: Final = 100


@click.group()
def messages() -> None:
    """List and correct received messages. They are stored byte for byte."""


_state = click.option("--state", type=click.Choice(STATES), help="Filter by state.")
_filters = options(
    destination_option,
    click.option(
        "--kind", metavar="MODEL.EVENT", help="Filter by data model and event type, such as PatientAdmin.Arrival."
    ),
    click.option("--source-id", metavar="ID", help="Filter by source."),
    click.option(
        "--quarantine-reason", metavar="WORD", help="Filter by the reason of the quarantine, such as source_unknown."
    ),
    since_option,
    until_option,
)
_correction = correction_options(MessageId(), _filters)


@messages.command(
    "list", epilog=example("messages list --destination lab --since 2h", "messages list --state quarantined --json")
)
@_state
@_filters
@list_options
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
@click.option("--payload", is_flag=True, help="Print only the received bytes. Requires --reason, and is audited.")
@optional_reason_option("With --payload: your reason to read it")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --payload: write to the new FILE (mode 0600) instead of stdout.",
)
@json_option
def show(number: int | UUID, *, payload: bool, reason: str | None, out: Path | None, as_json: bool) -> None:
    """Show message ID (or its UUID), its deliveries and its audit rows; with --payload only its bytes."""
    if payload:
        if reason is None or as_json:
            raise click.UsageError("--payload requires --reason and cannot be combined with --json")
        _disclose(number, reason, out)
        return
    if reason is not None or out is not None:
        raise click.UsageError("--reason and --out require --payload")
    with opened() as session, session.engine.connect() as connection:
        found = queries.message(connection, number)
        made = queries.deliveries(connection, DeliveryFilter(message_id=found["id"]), limit=RELATED_LIMIT)
        audited = queries.audit(connection, AuditFilter(message_uuid=found["uuid"]), limit=RELATED_LIMIT)
    if as_json:
        output.document(found | {"deliveries": made, "audit_events": audited})
        return
    output.row(found, as_json=False)
    click.echo()
    output.rows(
        made,
        ("id", "handler", "generation", "state", "attempts", "error_class", "lane"),
        as_json=False,
        nothing="no delivery: no handler was enabled for this kind; see `redox-receiver handlers list`",
    )
    click.echo()
    output.rows(audited, ("id", "at", "action", "outcome", "reason", "actor"), as_json=False, nothing="no audit row")


def _disclose(number: int | UUID, reason: str, out: Path | None) -> None:
    with opened() as session:
        body = disclose(session.engine, session.keyring, number, datetime.now(UTC), actor=session.actor, reason=reason)
    if out is not None:
        with new_file(out, body):
            output.say(f"wrote {len(body)} bytes to {out}")
    elif sys.stdout.isatty():
        # The sender of the message must not control this terminal.
        click.echo("\n".join(map(output.escaped, body.decode("utf-8", "backslashreplace").splitlines())))
    else:
        click.echo(body, nl=False)


@messages.command(
    epilog=example(
        "messages replay 8123 --reason 'register lost it'",
        "messages replay --kind Results.New --since 1d --handler results --dry-run --reason 'results is new'",
    )
)
@correction_options(
    MessageId(),
    _state,
    _filters,
    click.option(
        "--handler", metavar="NAME", help="Deliver only to this handler. Default: every handler that is enabled now."
    ),
    click.option(
        "--after",
        type=click.IntRange(0),
        default=0,
        metavar="ID",
        help="Only ids above ID, to continue an interrupted replay. Default: 0.",
    ),
)
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
    """Deliver messages again, by ID or by filters, in the order of their arrival.

    They go to the end of their lanes, as a new generation with a new idempotency key. The output counts the newer
    messages that were handled before them. `deliveries retry` keeps the place in the lane instead.
    """
    where = _chosen(ids, filters)
    with opened() as session:
        carry_out(
            corrections(MessageCorrections, session).replay(
                where, datetime.now(UTC), handler=handler, reason=reason, dry_run=dry_run, after=after
            ),
            what="messages",
            verb="replayed",
            dry_run=dry_run,
            as_json=as_json,
            resume="Repeat the command with --after {last} for the rest.",
        )


@messages.command(
    epilog=example(
        "messages release 8123 --reason 'source registered'",
        "messages release --quarantine-reason source_unknown --dry-run --reason 'registered'",
    )
)
@_correction
def release(ids: tuple[int | UUID, ...], *, dry_run: bool, reason: str, as_json: bool, **filters: Any) -> None:
    """Check quarantined messages again with the current configuration, and deliver those that pass.

    The others stay in quarantine. The output gives the reason for each.
    """
    where = _chosen(ids, filters)
    with opened() as session:
        carry_out(
            corrections(MessageCorrections, session).release(where, datetime.now(UTC), reason=reason, dry_run=dry_run),
            what="messages",
            verb="released",
            dry_run=dry_run,
            as_json=as_json,
        )


@messages.command(epilog=example("messages discard 8123 --reason 'a vendor test, agreed with them'"))
@_correction
def discard(ids: tuple[int | UUID, ...], *, dry_run: bool, reason: str, as_json: bool, **filters: Any) -> None:
    """Discard quarantined messages. Their rows and bytes are kept."""
    where = _chosen(ids, filters)
    with opened() as session:
        carry_out(
            corrections(MessageCorrections, session).discard(where, datetime.now(UTC), reason=reason, dry_run=dry_run),
            what="messages",
            verb="discarded",
            dry_run=dry_run,
            as_json=as_json,
        )


def _chosen(ids: tuple[int | UUID, ...], filters: dict[str, Any]) -> MessageFilter:
    where = MessageFilter(ids=ids, **filters)
    require_selection(queries.empty(where), "--destination, --kind, --since")
    return where
