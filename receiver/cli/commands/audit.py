"""`audit`: what happened, and what can be proved about it.

May not change a row: nothing can, and `verify` finds what was changed around us.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

import click

from receiver.cli import output
from receiver.cli.options import (
    before_option,
    destination_option,
    example,
    json_option,
    limit_option,
    nothing,
    optional_reason_option,
    page_note,
    since_option,
    until_option,
)
from receiver.cli.session import opened
from receiver.errors import IntegrityError
from receiver.storage.evidence import verify as proof
from receiver.storage.operations import queries
from receiver.storage.operations.disclosure import disclose_notes
from receiver.storage.operations.queries import AuditFilter

COLUMNS: Final = ("id", "at", "action", "outcome", "reason", "actor", "destination", "subject", "count")


@click.group()
def audit() -> None:
    """What happened: each message, refusal, change and correction. Rows are only ever added."""


@audit.command(
    "list",
    epilog=example(
        "audit list --action message.refuse --since 15m",
        "audit list --action delivery --actor alice@ops1 --notes --reason 'ticket 4711'",
        "audit list --action audit.disclose --notes --reason 'yearly review'",
    ),
)
@click.option("--action", metavar="SUBJECT[.VERB]", help="Such as message.refuse, or message for all of its verbs.")
@click.option("--outcome", metavar="WORD", help="That ended so.")
@click.option("--reason-code", metavar="CODE", help="Only rows with this code in their column `reason`.")
@optional_reason_option("With --notes, why you read them; without it, the same as --reason-code. With --notes")
@click.option("--actor", metavar="USER@HOST", help="By this person, worker, or redox.")
@destination_option
@click.option("--message-uuid", type=click.UUID, metavar="UUID", help="Of this message.")
@click.option("--subject", metavar="TABLE:ID", help="Of this row, such as deliveries:1205.")
@since_option
@until_option
@before_option
@limit_option
@click.option("--notes", is_flag=True, help="Open the reasons that people gave: audited, and wants --reason.")
@output.columns_option
@json_option
def list_(
    *,
    before: int | None,
    limit: int,
    notes: bool,
    reason: str | None,
    reason_code: str | None,
    as_json: bool,
    **filters: Any,
) -> None:
    """List audit rows, newest first.

    The reasons that people gave are sealed, for they may name a patient. --notes opens those of the rows that are
    listed, after a row `audit.disclose` that says who opened them and why.
    """
    if notes and reason is None:
        raise click.UsageError(
            "--notes opens sealed texts, and wants --reason TEXT: why you read them. To list only "
            "rows with a reason code, use --reason-code"
        )
    if not notes and reason is not None and reason_code is not None:
        raise click.UsageError("without --notes, --reason and --reason-code are the same filter: give one")
    where = AuditFilter(reason=reason_code if notes else reason_code or reason, **filters)
    with opened() as session, session.engine.connect() as connection:
        found = queries.audit(connection, where, before=before, limit=limit)
        if notes:
            found = disclose_notes(
                connection, session.keyring, found, datetime.now(UTC), actor=session.actor, reason=str(reason)
            )
    summed = any(each["count"] > 1 for each in found)
    shown = [name for name in COLUMNS if summed or name != "count"]
    output.rows(
        found,
        [*shown, "note"] if notes else shown,
        as_json=as_json,
        nothing=nothing(asdict(where), "no audit row yet: `redox-receiver destination add NAME` writes the first"),
    )
    page_note(found, limit)


@audit.command(epilog=example("audit verify", "audit verify --payloads"))
@click.option("--payloads", is_flag=True, help="Open every payload too and compare its digest: reads all of them.")
@json_option
def verify(*, payloads: bool, as_json: bool) -> None:
    """Find rows that were changed, added or deleted without the keyring.

    Reads the audit, the messages and the registry: finds each row that was changed or added, each gap in the audit, and
    each message without its audit row. Cannot find that the newest audit rows were deleted together with their
    messages, nor that a registry row was deleted or put back to an earlier state.

    Exits with 1 and names the first row that does not hold.
    """
    with opened() as session, session.engine.connect() as connection:
        found = proof.verify(connection, session.keyring, payloads=payloads)
    output.row({"rows": found.rows, "writers": found.writers, "first_bad": found.first_bad}, as_json=as_json)
    if found.first_bad is not None:
        raise IntegrityError(f"{found.first_bad}: keep this database as it is, and compare with a backup")
