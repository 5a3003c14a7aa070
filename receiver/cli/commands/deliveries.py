"""The command group `deliveries`: lists and corrects the deliveries of messages to handlers.

Must not show the text of an error, which may quote a patient, except by `show --error --reason`, after an audit row.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import click

from receiver.cli import output
from receiver.cli.correction_output import carry_out, corrections, require_selection
from receiver.cli.options import (
    correction_options,
    destination_option,
    example,
    json_option,
    list_options,
    nothing,
    optional_reason_option,
    options,
    page_note,
    reason_option,
    since_option,
    until_option,
)
from receiver.cli.session import opened
from receiver.states import DeliveryState
from receiver.storage.operations import queries
from receiver.storage.operations.corrections.delivery_corrections import DeliveryCorrections
from receiver.storage.operations.disclosure import disclose_error
from receiver.storage.operations.queries import DeliveryFilter
from receiver.storage.registry.handler_changes import RESTORED

COLUMNS: Final = (
    "id",
    "kind",
    "handler",
    "state",
    "error_class",
    "attempts",
    "destination",
    "created_at",
    "generation",
)
NONE: Final = (
    "no delivery yet: a message gets one for each handler that is enabled for its kind; see "
    "`redox-receiver handlers list`"
)
STATES: Final = tuple(state.value for state in DeliveryState)


@click.group()
def deliveries() -> None:
    """List and correct deliveries: one for each message and handler."""


_filters = options(
    click.option("--handler", metavar="NAME", help="Filter by handler."),
    click.option("--state", type=click.Choice(STATES), help="Filter by state."),
    click.option("--error-class", metavar="CLASS", help="Filter by the error class of the last attempt."),
    destination_option,
    click.option("--lane", metavar="LANE", help="Filter by lane."),
    since_option,
    until_option,
)
_correction = correction_options(int, _filters)


@deliveries.command(
    "list", epilog=example("deliveries list --state dead --since 2h", "deliveries list --handler register --json")
)
@_filters
@click.option("--message-id", type=int, metavar="ID", help="Filter by message.")
@list_options
def list_(*, before: int | None, limit: int, as_json: bool, **filters: Any) -> None:
    """List deliveries, newest first."""
    with opened() as session, session.engine.connect() as connection:
        found = queries.deliveries(connection, DeliveryFilter(**filters), before=before, limit=limit)
    output.rows(
        [each | ({"state": "running"} if each["running"] and not as_json else {}) for each in found],
        COLUMNS,
        as_json=as_json,
        nothing=nothing(filters, NONE),
    )
    page_note(found, limit)


@deliveries.command(epilog=example("deliveries show 1205", "deliveries show 1205 --error --reason 'ticket 4711'"))
@click.argument("number", metavar="ID", type=int)
@click.option("--error", is_flag=True, help="Show the text of the last error. Requires --reason, and is audited.")
@optional_reason_option("With --error: your reason to read it")
@json_option
def show(number: int, *, error: bool, reason: str | None, as_json: bool) -> None:
    """Show delivery ID with its attempts, and the stack frames of the last error.

    Error texts are encrypted, because they may quote a patient. --error decrypts the text of the last attempt. The
    audit log records your access and your reason. Errors of the receiver itself are shown without --error, as
    `error_shown`.
    """
    if error != (reason is not None):
        raise click.UsageError("--error requires --reason TEXT, and the reverse, because the text may quote a patient")
    with opened() as session, session.engine.connect() as connection:
        found = queries.delivery(connection, number)
    if error:
        with opened() as session:
            found["error_text"] = disclose_error(
                session.engine, session.keyring, number, datetime.now(UTC), actor=session.actor, reason=str(reason)
            )
        if found["error_text"] is None:
            output.say("this delivery has no error text")
    if as_json:
        output.document(found)
        return
    tried = found.pop("delivery_attempts")
    output.row(found, as_json=False)
    click.echo()
    output.rows(
        tried,
        ("attempt", "outcome", "error_class", "worker", "started_at", "ended_at"),
        as_json=False,
        nothing="no attempt yet",
    )
    if found["error_frames"]:
        click.echo("\nstack of the last error, outermost frame first:")
        for frame in found["error_frames"]:
            click.echo(f"  {output.escaped(frame)}")


@deliveries.command(
    epilog=example(
        "deliveries retry 1205 --reason 'register fixed in 1.4.2'",
        "deliveries retry --handler register --error-class KeyError --since 1d --dry-run --reason 'fixed in 1.4.2'",
    )
)
@_correction
def retry(ids: tuple[int, ...], *, dry_run: bool, reason: str, as_json: bool, **filters: Any) -> None:
    """Run deliveries again, by ID or by filters (only dead ones, unless --state is given).

    They keep their place in the lane and their idempotency key. They get the full number of attempts again.
    """
    where = _chosen(ids, filters)
    with opened() as session:
        carry_out(
            corrections(DeliveryCorrections, session).retry(where, datetime.now(UTC), reason=reason, dry_run=dry_run),
            what="deliveries",
            verb="retried",
            dry_run=dry_run,
            as_json=as_json,
        )


@deliveries.command(
    epilog=example(
        "deliveries skip 1205 --reason 'entered by hand, ticket 4711'",
        "deliveries skip --handler register --state dead --dry-run --reason 'entered by hand'",
    )
)
@_correction
def skip(ids: tuple[int, ...], *, dry_run: bool, reason: str, as_json: bool, **filters: Any) -> None:
    """Skip deliveries, by ID, or by filters with --state pending or dead. Their lanes continue, even if held."""
    where = _chosen(ids, filters)
    if not ids and where.state is None:
        raise click.UsageError("filters require a state: add --state pending or --state dead")
    with opened() as session:
        carry_out(
            corrections(DeliveryCorrections, session).skip(where, datetime.now(UTC), reason=reason, dry_run=dry_run),
            what="deliveries",
            verb="skipped",
            dry_run=dry_run,
            as_json=as_json,
        )


@deliveries.command(
    epilog=example(
        "deliveries resume --reason 'those that had run are skipped'",
        "deliveries resume --handler register --destination lab --reason 'ticket 4711'",
    )
)
@click.option("--handler", metavar="NAME", help="Only for this handler. Default: all handlers.")
@click.option("--destination", metavar="NAME", help="Only at this destination. Default: all destinations.")
@reason_option
@json_option
def resume(*, handler: str | None, destination: str | None, reason: str, as_json: bool) -> None:
    """Run the deliveries that `db restore` has put on hold, and newer ones behind them.

    A restored database does not know which of them have run since the backup: skip those first with `deliveries skip`.
    """
    resumed = []
    with opened() as session:
        with session.engine.connect() as connection:
            held = [
                each
                for each in queries.subscriptions(connection, destination=destination)
                if each["pause_reason"] == RESTORED and handler in (None, each["handler"])
            ]
            waiting = queries.pending(connection)
        for each in held:
            session.registration.resume_handler(
                each["handler"], datetime.now(UTC), destination=each["destination"], reason=reason
            )
            resumed.append(
                {
                    "destination": each["destination"],
                    "handler": each["handler"],
                    "pending": waiting.get((each["destination"], each["handler"]), 0),
                }
            )
    output.rows(
        resumed,
        ("destination", "handler", "pending"),
        as_json=as_json,
        nothing="nothing is on hold: only `db restore` puts deliveries on hold. To resume a paused handler, use "
        "`handlers resume`",
    )


def _chosen(ids: tuple[int, ...], filters: dict[str, Any]) -> DeliveryFilter:
    where = DeliveryFilter(ids=ids, **filters)
    require_selection(queries.empty(where), "--handler, --state, --error-class, --since")
    return where
