"""`deliveries`: what became of messages at their handlers, and putting that right.

Must not show the text of an error, for it may quote a patient, but by `show --error --reason`, which is in the audit
first.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import click

from receiver.cli import output
from receiver.cli.correction_output import carry_out, correction
from receiver.cli.options import (
    before_option,
    destination_option,
    dry_run_option,
    example,
    json_option,
    limit_option,
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
from receiver.storage.operations.disclosure import disclose_error
from receiver.storage.operations.queries import DeliveryFilter
from receiver.storage.registry.changes import RESTORED

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
    "no delivery yet: each message makes one for each handler that is enabled for its kind; see "
    "`redox-receiver handlers list`"
)
STATES: Final = tuple(state.value for state in DeliveryState)


@click.group()
def deliveries() -> None:
    """What became of messages: one delivery for each handler that a message is for."""


_filters = options(
    click.option("--handler", metavar="NAME", help="Of this handler."),
    click.option("--state", type=click.Choice(STATES), help="In this state."),
    click.option("--error-class", metavar="CLASS", help="Whose last attempt ended with this error."),
    destination_option,
    click.option("--lane", help="In this lane."),
    since_option,
    until_option,
)


@deliveries.command(
    "list", epilog=example("deliveries list --state dead --since 2h", "deliveries list --handler register --json")
)
@_filters
@click.option("--message-id", type=int, metavar="ID", help="Of this message.")
@before_option
@limit_option
@output.columns_option
@json_option
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
@click.option("--error", is_flag=True, help="Show the text of the last error: audited, and wants --reason.")
@optional_reason_option("With --error, why you read it")
@json_option
def show(number: int, *, error: bool, reason: str | None, as_json: bool) -> None:
    """Show delivery ID, and each of its attempts with the frames where it failed.

    The text of an error is sealed, for it may quote a patient. --error opens that of the last attempt and records in
    the audit who read it and why. Errors that the receiver itself wrote are shown without it, as `error_shown`.
    """
    if error != (reason is not None):
        raise click.UsageError("--error and --reason TEXT go together: the text may quote a patient")
    with opened() as session, session.engine.connect() as connection:
        found = queries.delivery(connection, number)
    if error:
        with opened() as session:
            found["error_text"] = disclose_error(
                session.engine, session.keyring, number, datetime.now(UTC), actor=session.actor, reason=str(reason)
            )
        if found["error_text"] is None:
            output.say("no text of an error is kept for this delivery")
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
        nothing="never tried",
    )
    if found["error_frames"]:
        click.echo("\nwhere it failed last, outermost first:")
        for frame in found["error_frames"]:
            click.echo(f"  {output.escaped(frame)}")


@deliveries.command(
    epilog=example(
        "deliveries retry 1205 --reason 'register fixed in 1.4.2'",
        "deliveries retry --handler register --error-class KeyError --since 1d --dry-run --reason 'fixed in 1.4.2'",
    )
)
@click.argument("ids", metavar="[ID]...", type=int, nargs=-1)
@_filters
@dry_run_option
@reason_option
@json_option
def retry(ids: tuple[int, ...], *, dry_run: bool, reason: str, as_json: bool, **filters: Any) -> None:
    """Run deliveries again, by ID or by filters (then the dead ones, unless --state says otherwise).

    They keep their place in the lane and their idempotency key, and have all their attempts before them.
    """
    where = _chosen(ids, filters)
    with opened() as session:
        carry_out(
            correction(session).retry(where, datetime.now(UTC), reason=reason, dry_run=dry_run),
            what="deliveries",
            verb="retried",
            dry_run=dry_run,
            as_json=as_json,
            resume="Give the same command again for the rest.",
        )


@deliveries.command(
    epilog=example(
        "deliveries skip 1205 --reason 'entered by hand, ticket 4711'",
        "deliveries skip --handler register --state dead --dry-run --reason 'entered by hand'",
    )
)
@click.argument("ids", metavar="[ID]...", type=int, nargs=-1)
@_filters
@dry_run_option
@reason_option
@json_option
def skip(ids: tuple[int, ...], *, dry_run: bool, reason: str, as_json: bool, **filters: Any) -> None:
    """Give deliveries up, by ID, or by filters with --state pending or dead: their lanes go on, held ones too."""
    where = _chosen(ids, filters)
    if not ids and where.state is None:
        raise click.UsageError("by filters, say which are to be skipped: --state pending or --state dead")
    with opened() as session:
        carry_out(
            correction(session).skip(where, datetime.now(UTC), reason=reason, dry_run=dry_run),
            what="deliveries",
            verb="skipped",
            dry_run=dry_run,
            as_json=as_json,
            resume="Give the same command again for the rest.",
        )


@deliveries.command(
    epilog=example(
        "deliveries resume --reason 'those that had run are skipped'",
        "deliveries resume --handler register --destination lab --reason 'ticket 4711'",
    )
)
@click.option("--handler", metavar="NAME", help="Only those of this handler.")
@click.option("--destination", metavar="NAME", help="Only those of this destination.")
@reason_option
@json_option
def resume(*, handler: str | None, destination: str | None, reason: str, as_json: bool) -> None:
    """Let deliveries run that `db restore` has put on hold, and what has come in behind them.

    A restored database does not know which of them have run since the backup was made: `deliveries skip` those first.
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
        nothing="nothing is on hold: `db restore` puts pending deliveries on hold, `handlers resume` lets a "
        "handler run on that was paused otherwise",
    )


def _chosen(ids: tuple[int, ...], filters: dict[str, Any]) -> DeliveryFilter:
    where = DeliveryFilter(ids=ids, **filters)
    if queries.empty(where):
        raise click.UsageError("say which: give IDs, or filters such as --handler, --state, --error-class, --since")
    return where
