"""The command `audit export`: sealed audit rows for another system, with a cursor to continue from.

Must not show a sealed reason (see `audit list --notes`).
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

import click
import msgspec

from receiver.cli import output
from receiver.cli.options import example, open_new_file
from receiver.cli.session import Session, opened
from receiver.errors import IntegrityError
from receiver.storage.evidence.audit_log import AuditEvent, write_once
from receiver.storage.evidence.seals import AuditSealer
from receiver.storage.operations.fhir_audit_event import fhir_audit_event
from receiver.storage.operations.queries.export_queries import EXPORT_COLUMNS, LogRange, export_rows, log_range

# A spreadsheet takes a cell that begins like this for a formula (OWASP: CSV Injection).
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")

_Rows = Iterable[Mapping[str, Any]]


@click.command(
    "export",
    epilog=example(
        "audit export --format jsonl --out audit-1.jsonl",
        "audit export --format fhir --after 4711 --limit 100000 --out audit-2.ndjson",
    ),
)
@click.option(
    "--format",
    "chosen",
    type=click.Choice(("jsonl", "csv", "fhir")),
    required=True,
    help="jsonl: one JSON object a line. csv: RFC 4180, safe for spreadsheets. fhir: one FHIR R4 AuditEvent a line.",
)
@click.option(
    "--after",
    type=click.IntRange(0),
    metavar="CURSOR",
    help="Begin after this row: the cursor that the last export printed. Default: the first row.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Export at most N rows. Default: all.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write to the new FILE (mode 0600) instead of stdout.",
)
def export_(*, chosen: str, after: int | None, limit: int | None, out: Path | None) -> None:
    """Export audit rows in the order of the signed log, and print the cursor for the next export on stderr.

    Seals the audit log first. The cursor is the index of the last row in the log: the next export continues after it,
    without a gap and without a repeat. The audit log first records the export as `audit.export`. Reasons of operators
    stay encrypted and are not exported.

    Exit status 1 if sealed rows are missing; the rows that are there are exported.
    """
    with opened() as session:
        AuditSealer(session.engine, session.keyring).seal(wait=True)
        with session.engine.connect() as connection:
            wanted = log_range(connection, after=after, limit=limit)
        if wanted is None:
            output.say(f"no sealed audit row after {after}" if after is not None else "no audit row yet")
            return
        if out is None:
            written = _export(session, wanted, chosen, sys.stdout.buffer)
        else:
            with open_new_file(out) as file:
                written = _export(session, wanted, chosen, file)
    output.say(f"exported {written} rows; next: --after {wanted.last}")
    if written != wanted.count:
        raise IntegrityError(
            f"{wanted.count - written} sealed rows between log index {wanted.first} and {wanted.last} are missing: run "
            "`redox-receiver audit verify`"
        )


def _export(session: Session, wanted: LogRange, chosen: str, file: BinaryIO) -> int:
    """Record the export, and then write the rows. Returns how many."""
    _record(session, wanted, chosen)
    counted = _Counted()
    with session.engine.connect() as connection:
        rows = counted.through(_in_utc(export_rows(connection, wanted)))
        file.writelines(_WRITERS[chosen](rows, wanted))
    file.flush()
    return counted.count


def _record(session: Session, wanted: LogRange, chosen: str) -> None:
    with session.engine.begin() as connection:
        write_once(
            connection,
            session.keyring,
            [
                AuditEvent(
                    action="audit.export",
                    outcome="done",
                    at=datetime.now(UTC),
                    actor=session.actor,
                    detail={"format": chosen, "count": wanted.count, "first": wanted.first, "last": wanted.last},
                )
            ],
        )


class _Counted:
    """Counts what passes through."""

    def __init__(self) -> None:
        self.count = 0

    def through(self, rows: _Rows) -> Iterator[Mapping[str, Any]]:
        for row in rows:
            self.count += 1
            yield row


def _in_utc(rows: _Rows) -> Iterator[Mapping[str, Any]]:
    return ({**row, "at": row["at"].astimezone(UTC)} for row in rows)


def _jsonl(rows: _Rows, _wanted: LogRange) -> Iterator[bytes]:
    return (msgspec.json.encode(row) + b"\n" for row in rows)


def _fhir(rows: _Rows, wanted: LogRange) -> Iterator[bytes]:
    return (msgspec.json.encode(fhir_audit_event(row, wanted.log)) + b"\n" for row in rows)


def _csv(rows: _Rows, _wanted: LogRange) -> Iterator[bytes]:
    line = io.StringIO(newline="")
    writer = csv.writer(line)  # its default dialect is RFC 4180: CRLF, and quotes where needed
    writer.writerow(EXPORT_COLUMNS)
    for row in rows:
        yield _taken(line)
        writer.writerow([_cell(row[name]) for name in EXPORT_COLUMNS])
    yield _taken(line)


def _taken(line: io.StringIO) -> bytes:
    text = line.getvalue()
    line.seek(0)
    line.truncate()
    return text.encode()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return msgspec.json.encode(value, order="sorted").decode()
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


_WRITERS: Final[dict[str, Callable[[_Rows, LogRange], Iterator[bytes]]]] = {"jsonl": _jsonl, "csv": _csv, "fhir": _fhir}
