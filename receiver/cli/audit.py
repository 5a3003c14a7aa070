"""`audit`: what happened, and the proof that it is whole.

May not change a row: nothing can, and `verify` finds what was changed around us.
"""

from __future__ import annotations

from typing import Any, Final

import click

from receiver.cli import output
from receiver.cli.options import (
    before_option,
    destination_option,
    example,
    json_option,
    limit_option,
    page_note,
    since_option,
)
from receiver.cli.session import opened
from receiver.errors import IntegrityError
from receiver.storage import proof, reading
from receiver.storage.reading import AuditFilter
from receiver.storage.sealing import Seals

COLUMNS: Final = ("id", "at", "action", "outcome", "reason", "actor", "destination", "subject", "count")


@click.group()
def audit() -> None:
    """What happened: each message, refusal, change and correction. Rows are only ever added."""


@audit.command("list", epilog=example("audit list --action message.refuse --since 15m",
                                      "audit list --action delivery --actor alice@ops1 --notes"))
@click.option("--action", metavar="SUBJECT[.VERB]", help="Such as message.refuse, or message for all of its verbs.")
@click.option("--outcome", metavar="WORD", help="That ended so.")
@click.option("--reason", metavar="WORD", help="For this reason.")
@click.option("--actor", metavar="USER@HOST", help="By this person, worker, or redox.")
@destination_option
@click.option("--message-uuid", type=click.UUID, metavar="UUID", help="Of this message.")
@click.option("--subject", metavar="TABLE:ID", help="Of this row, such as deliveries:1205.")
@since_option
@before_option
@limit_option
@click.option("--notes", is_flag=True, help="Open the reasons that people gave.")
@json_option
def list_(*, before: int | None, limit: int, notes: bool, as_json: bool, **filters: Any) -> None:
    """List audit rows, newest first."""
    with opened() as session, session.engine.connect() as connection:
        found = reading.audit(connection, AuditFilter(**filters), before=before, limit=limit)
        if notes:
            seals = Seals(session.keyring)
            found = [each | {"note": reading.note(connection, seals, each["id"])} for each in found]
    summed = any(each["count"] > 1 for each in found)
    shown = [name for name in COLUMNS if summed or name != "count"]
    output.rows(found, [*shown, "note"] if notes else shown, as_json=as_json, nothing="no such audit row")
    page_note(found, limit)


@audit.command(epilog=example("audit verify", "audit verify --payloads"))
@click.option("--payloads", is_flag=True, help="Open every payload too and compare its digest: reads all of them.")
@json_option
def verify(*, payloads: bool, as_json: bool) -> None:
    """Prove that no row of the audit, no message and no row of the registry was changed, added or taken away.

    Exits with 1 and names the first row that does not hold.
    """
    with opened() as session, session.engine.connect() as connection:
        found = proof.verify(connection, session.keyring, payloads=payloads)
    output.row({"rows": found.rows, "writers": found.writers, "first_bad": found.first_bad}, as_json=as_json)
    if found.first_bad is not None:
        raise IntegrityError(f"{found.first_bad}: keep this database as it is, and compare with a backup")
