"""The command group `audit`: lists and verifies the audit log.

Must not change a row. `verify` finds rows that were changed outside of this program.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

import click

from receiver.cli import output
from receiver.cli.commands.audit_review import review_
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
    """List or verify the audit log. It records messages, refusals, changes and corrections, and is append-only."""


@audit.command(
    "list",
    epilog=example(
        "audit list --action message.refuse --since 15m",
        "audit list --action delivery --actor alice@ops1 --notes --reason 'ticket 4711'",
        "audit list --action audit.disclose --notes --reason 'yearly review'",
    ),
)
@click.option(
    "--action",
    metavar="SUBJECT[.VERB]",
    help="Filter by action, such as message.refuse, or message for all of its actions.",
)
@click.option("--outcome", metavar="WORD", help="Filter by outcome.")
@click.option("--reason-code", metavar="CODE", help="Filter by the reason code in the column `reason`.")
@optional_reason_option("Without --notes: the same as --reason-code. With --notes: your reason to read them")
@click.option("--actor", metavar="USER@HOST", help="Filter by actor: an operator, a worker, or redox.")
@destination_option
@click.option("--message-uuid", type=click.UUID, metavar="UUID", help="Filter by message.")
@click.option("--subject", metavar="TABLE:ID", help="Filter by the row that was changed, such as deliveries:1205.")
@since_option
@until_option
@before_option
@limit_option
@click.option(
    "--notes", is_flag=True, help="Decrypt the reasons that operators gave. Requires --reason, and is audited."
)
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

    Reasons that operators gave are encrypted, because they may name a patient. --notes decrypts those of the listed
    rows. The audit log first records your access as `audit.disclose`, with your reason.
    """
    if notes and reason is None:
        raise click.UsageError(
            "--notes decrypts texts and requires --reason TEXT: give your reason to read them. To filter by "
            "reason code, use --reason-code"
        )
    if not notes and reason is not None and reason_code is not None:
        raise click.UsageError("without --notes, --reason and --reason-code are the same filter: use one of them")
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
        nothing=nothing(asdict(where), "no audit row yet: `redox-receiver destination add NAME` writes the first one"),
    )
    page_note(found, limit)


@audit.command(epilog=example("audit verify", "audit verify --payloads"))
@click.option("--payloads", is_flag=True, help="Also decrypt every payload and compare its digest. Reads all payloads.")
@json_option
def verify(*, payloads: bool, as_json: bool) -> None:
    """Find rows that were changed, added or deleted without the keyring.

    Reads the audit log, the messages and the registry. Finds each changed or added row, each gap in the audit log, and
    each message without its audit row. Cannot detect that the newest audit rows were deleted together with their
    messages, or that a registry row was deleted or reset to an earlier state.

    Exit status 1 if the verification fails; the error names the first row that fails.
    """
    with opened() as session, session.engine.connect() as connection:
        found = proof.verify(connection, session.keyring, payloads=payloads)
    output.row({"rows": found.rows, "writers": found.writers, "first_bad": found.first_bad}, as_json=as_json)
    if found.first_bad is not None:
        raise IntegrityError(f"{found.first_bad}: do not change this database, and compare it with a backup")


audit.add_command(review_)
