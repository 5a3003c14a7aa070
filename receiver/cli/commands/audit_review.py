"""The command `audit review`: what happened since the last review, and the record that somebody reviewed it.

Must not show a sealed reason (see `audit list --notes`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import click

from receiver.cli import output
from receiver.cli.options import example, json_option, optional_reason_option
from receiver.cli.session import opened
from receiver.storage.evidence.audit_log import AuditEvent, write_once
from receiver.storage.operations.queries.review_queries import last_review, newest_audit_row, review

COLUMNS: Final = ("about", "action", "reason", "outcome", "actor", "destination", "count", "last_at", "last_id")


@click.command(
    "review", epilog=example("audit review", "audit review --sign-off --reason 'weekly review, nothing unusual'")
)
@click.option(
    "--after", type=click.IntRange(0), metavar="ID", help="Begin after this audit row. Default: the last review."
)
@click.option("--sign-off", is_flag=True, help="Record that you have reviewed what is shown. Requires --reason.")
@optional_reason_option("What you found")
@json_option
def review_(*, after: int | None, sign_off: bool, reason: str | None, as_json: bool) -> None:
    """Show what needs a review since the last one: disclosures, refusals of authentic senders, changes of keys and
    registry, and corrections.

    Each line sums up one actor's actions of one kind. `audit list` shows the single rows.
    """
    if sign_off and reason is None:
        raise click.UsageError("--sign-off requires --reason TEXT: say what you found")
    with opened() as session, session.engine.connect() as connection:
        before = last_review(connection)
        first = after if after is not None else int(str(before["last"])) if before is not None else 0
        last = newest_audit_row(connection)
        found = review(connection, after=first, last=last)
        if sign_off:
            write_once(
                connection,
                session.keyring,
                [
                    AuditEvent(
                        action="audit.review",
                        outcome="done",
                        at=datetime.now(UTC),
                        actor=session.actor,
                        note=reason,
                        detail={"first": first + 1, "last": last, "lines": len(found)},
                    )
                ],
            )
            connection.commit()
    if before is not None and not as_json:
        output.say(f"the last review was by {before['actor']} and covered the audit rows up to {before['last']}")
    output.rows(found, COLUMNS, as_json=as_json, nothing=f"nothing to review after audit row {first}")
    if sign_off:
        output.say(f"recorded your review of the audit rows {first + 1} to {last}")
