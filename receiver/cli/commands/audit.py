"""The command group `audit`: lists and verifies the audit log, and gives proofs that others can check.

Must not change a row. `verify` finds rows that were changed outside of this program.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import click

from receiver.cli import output
from receiver.cli.commands.audit_export import export_
from receiver.cli.commands.audit_report import report_
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
from receiver.errors import IntegrityError, ProofInvalid
from receiver.storage.evidence import proofs
from receiver.storage.evidence import verify as proof
from receiver.storage.evidence.seals import AuditSealer
from receiver.storage.operations import queries
from receiver.storage.operations.disclosure import disclose_notes
from receiver.storage.operations.queries import AuditFilter
from receiver.transparency.checkpoint import VerifierKey
from receiver.transparency.proof_file import CONSISTENCY, ConsistencyProof, InclusionProof

COLUMNS: Final = ("id", "at", "action", "outcome", "reason", "actor", "destination", "subject", "count")


@click.group()
def audit() -> None:
    """List, verify or prove the audit log. It records messages, refusals, changes and corrections.

    It is append-only. A worker signs its size and the root of its Merkle tree every few seconds.
    """


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


@audit.command(epilog=example("audit verify", "audit verify --payloads", "audit verify --checkpoint audit.checkpoint"))
@click.option("--payloads", is_flag=True, help="Also decrypt every payload and compare its digest. Reads all payloads.")
@click.option(
    "--checkpoint",
    type=click.File(),
    metavar="FILE",
    help="A checkpoint that you kept elsewhere: the log must still have all that it had then.",
)
@json_option
def verify(*, payloads: bool, checkpoint: TextIO | None, as_json: bool) -> None:
    """Find rows that were changed, added or deleted without the keyring.

    Reads the seals, the audit log, the messages and the registry. Finds each changed or added row, each gap in the
    audit log, each sealed row that is missing, each message without its audit row, and a registry that changed
    without a recorded change. Without --checkpoint it cannot detect that the newest seals were deleted together with
    all that they seal: keep checkpoints where this database's administrators cannot write.

    Exit status 1 if the verification fails; the error names the first row that fails.
    """
    kept = None if checkpoint is None else checkpoint.read()
    with opened() as session, session.engine.connect() as connection:
        found = proof.verify(connection, session.keyring, payloads=payloads, checkpoint=kept)
    output.row(
        {
            "rows": found.rows,
            "writers": found.writers,
            "seals": found.seals,
            "sealed": found.sealed,
            "first_bad": found.first_bad,
        },
        as_json=as_json,
    )
    if found.first_bad is not None:
        raise IntegrityError(f"{found.first_bad}: do not change this database, and compare it with a backup")


_to_option: Final = click.option(
    "--out", "to", type=click.File("w"), default="-", metavar="FILE", help="Write to FILE. Default: stdout."
)


@audit.command(epilog=example("audit checkpoint --out audit.checkpoint", "audit checkpoint --since audit.checkpoint"))
@click.option(
    "--since",
    type=click.File(),
    metavar="FILE",
    help="Write a proof that the log extends this earlier checkpoint, instead of the checkpoint alone.",
)
@_to_option
def checkpoint(*, since: TextIO | None, to: TextIO) -> None:
    """Seal the audit log, and write its checkpoint: a signed note with its size and root (c2sp.org/tlog-checkpoint).

    A checkpoint shows nothing of any row. Keep it where this database's administrators cannot write: `audit verify
    --checkpoint` then finds that rows were deleted, or that an older copy of the database was restored.
    """
    with opened() as session:
        AuditSealer(session.engine, session.keyring).seal(wait=True)
        with session.engine.connect() as connection:
            if since is None:
                written = proofs.newest_checkpoint(connection)
            else:
                written = proofs.prove_growth(connection, session.keyring, since.read()).text()
    to.write(written)


@audit.command(epilog=example("audit prove 4711 --out row-4711.proof"))
@click.argument("row", type=int)
@_to_option
def prove(row: int, *, to: TextIO) -> None:
    """Write a proof that audit row ROW is in the signed log (c2sp.org/tlog-proof).

    It holds the row's MAC, which shows nothing of the row, and can be checked without database and keyring.
    """
    with opened() as session:
        AuditSealer(session.engine, session.keyring).seal(wait=True)
        with session.engine.connect() as connection:
            written = proofs.prove_row(connection, row).text()
    to.write(written)


@audit.command(epilog=example("audit check-proof row-4711.proof --public-key seal.pub"))
@click.argument("file", type=click.File())
@click.option(
    "--public-key",
    type=click.File(),
    required=True,
    metavar="FILE",
    help="The public key that signs the log, as `keys public` shows it.",
)
@json_option
def check_proof(file: TextIO, *, public_key: TextIO, as_json: bool) -> None:
    """Check a proof of `audit prove` or `audit checkpoint --since` with the public key alone.

    Needs no database and no keyring. Exit status 1 if the proof does not hold.
    """
    text, keys = file.read(), [VerifierKey.parse(line) for line in public_key.read().splitlines() if line.strip()]
    failure = ProofInvalid("the file of the public key is empty")
    for key in keys:
        try:
            found = _checked(text, key)
        except ProofInvalid as exc:
            failure = exc
        else:
            output.row(found, as_json=as_json)
            return
    raise failure


def _checked(text: str, key: VerifierKey) -> dict[str, Any]:
    if text.startswith(CONSISTENCY):
        earlier, later = ConsistencyProof.parse(text).verify(key)
        return {"log": later.origin, "size": later.size, "root": later.root.hex(), "extends": earlier.size}
    found = InclusionProof.parse(text)
    size = found.verify(key)
    return {
        "log": size.origin,
        "size": size.size,
        "root": size.root.hex(),
        "leaf": found.index,
        "mac": found.entry.hex(),
    }


audit.add_command(review_)
audit.add_command(export_)
audit.add_command(report_)
