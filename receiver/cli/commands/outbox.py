"""The command group `outbox`: lists requests to Redox and their results, and sends them again.

Must not show a body, except into a new file, after an audit row.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click

from receiver.cli import output
from receiver.cli.correction_output import corrections, list_unchanged, require_selection
from receiver.cli.options import (
    correction_options,
    example,
    json_option,
    list_options,
    new_file,
    nothing,
    optional_reason_option,
    options,
    page_note,
    since_option,
)
from receiver.cli.session import Session, opened
from receiver.errors import NotFound
from receiver.findings.formatting import count
from receiver.outbound.outbox.bodies import read_call
from receiver.states import OutboxState
from receiver.storage.operations import outbound_requests
from receiver.storage.operations.corrections.request_corrections import RequestCorrections
from receiver.storage.operations.disclosure import disclose_request
from receiver.storage.operations.outbound_requests import RequestFilter

COLUMNS: Final = ("id", "kind", "api_key", "state", "attempts", "status", "error_class", "ready_at", "created_at")
STATES: Final = tuple(state.value for state in OutboxState)
_FILE: Final = click.Path(dir_okay=False, path_type=Path)

_filters = options(
    click.option("--state", type=click.Choice(STATES), help="Filter by state."),
    click.option("--key", "api_key", metavar="NAME", help="Filter by API key."),
    click.option("--call", type=click.Choice(["send", "query", "fhir", "upload"]), help="Filter by type of call."),
    click.option("--kind", metavar="MODEL.EVENT", help="Filter by data model and event type, such as Notes.New."),
    click.option("--error-class", metavar="CLASS", help="Filter by the error class of the last attempt."),
    since_option,
)


@click.group()
def outbox() -> None:
    """List and retry requests to Redox: queued ones, in order for each destination, and immediate calls."""


@outbox.command("list", epilog=example("outbox list --state dead --since 1d", "outbox list --key staging --json"))
@_filters
@list_options
def list_(*, before: int | None, limit: int, as_json: bool, **filters: Any) -> None:
    """List requests, newest first."""
    with opened() as session, session.engine.connect() as connection:
        found = outbound_requests.requests(connection, RequestFilter(**filters), before=before, limit=limit)
    output.rows(
        [each | ({"state": "sending"} if each["sending"] and not as_json else {}) for each in found],
        COLUMNS,
        as_json=as_json,
        nothing=nothing(
            filters,
            "no request yet: handlers (`context.outbox`, `context.redox`) and `redox-receiver outbound send` make them",
        ),
    )
    page_note(found, limit)


@outbox.command(epilog=example("outbox show 12", "outbox show 12 --answer-out why.json --reason 'ticket 4711'"))
@click.argument("number", metavar="ID", type=int)
@click.option(
    "--request-out", type=_FILE, metavar="FILE", help="Write the body of the request to the new FILE (mode 0600)."
)
@click.option(
    "--answer-out",
    type=_FILE,
    metavar="FILE",
    help="Write the answer of Redox, or its errors, to the new FILE (mode 0600).",
)
@optional_reason_option("Your reason to read the bodies")
@json_option
def show(number: int, *, request_out: Path | None, answer_out: Path | None, reason: str | None, as_json: bool) -> None:
    """Show request ID, and optionally write its bodies to files."""
    wanted = request_out is not None or answer_out is not None
    if wanted is not (reason is not None):
        raise click.UsageError("--request-out and --answer-out require --reason, and the reverse")
    with opened() as session:
        with session.engine.connect() as connection:
            found = outbound_requests.request(connection, number)
        if wanted:
            _disclose(session, number, str(reason), request_out, answer_out)
    output.row(found, as_json=as_json)


def _disclose(session: Session, number: int, reason: str, request_out: Path | None, answer_out: Path | None) -> None:
    request, answer = disclose_request(
        session.engine, session.keyring, number, datetime.now(UTC), actor=session.actor, reason=reason
    )
    if answer_out is not None and answer is None:
        raise NotFound(f"request {number} has no answer: omit --answer-out")
    with ExitStack() as stack:
        if request_out is not None:
            stack.enter_context(new_file(request_out, read_call(request).body or b""))
        if answer_out is not None:
            stack.enter_context(new_file(answer_out, answer or b""))


@outbox.command(
    epilog=example(
        "outbox retry 12 --reason 'the destination is open again'",
        "outbox retry --error-class Rejected --since 1d --dry-run --reason 'source registered'",
        "outbox retry --state held --reason 'not sent before the restore, says the other side'",
    )
)
@correction_options(int, _filters)
def retry(ids: tuple[int, ...], *, dry_run: bool, reason: str, as_json: bool, **filters: Any) -> None:
    """Send requests again, by ID or by filters (only dead ones, unless --state is given).

    They keep their bytes and their order. Requests that a restore has put on hold may already have been sent.
    """
    where = RequestFilter(ids=ids, **filters)
    require_selection(where.empty, "--state, --key, --error-class, --since")
    with opened() as session:
        done = corrections(RequestCorrections, session).retry(where, datetime.now(UTC), reason=reason, dry_run=dry_run)
    left = [{"id": number, "why": why} for number, why in done.left.items()]
    if as_json:
        output.document({"dry_run": dry_run, "done": list(done.done), "left": left})
    else:
        click.echo(f"{'would be ' if dry_run else ''}retried: {count(len(done.done), 'request', 'requests')}")
    list_unchanged(left)
