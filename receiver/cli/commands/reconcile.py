"""The command `reconcile`: compares an export of Redox's delivery log with the recorded messages.

Redox does not document the format of the export: the command reads any CSV with a header row, or JSON lines, and an
option names the column of the ids.

Must not print content of the file, except ids in the format of a log id.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final

import click

from receiver.cli import output
from receiver.cli.options import destination_option, example, json_option
from receiver.cli.session import opened
from receiver.errors import ConfigurationError, IntegrityError
from receiver.protocol.sources import ID_SHAPE
from receiver.storage.operations.reconcile import recorded

_BATCH_SIZE: Final = 5_000
_JSON: Final = frozenset({".jsonl", ".ndjson", ".json"})
COLUMNS: Final = ("line", "log_id")


@click.command(epilog=example("reconcile --from log.csv --column 'Log ID' --destination lab"))
@click.option(
    "--from",
    "source",
    required=True,
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The export: CSV with a header row, or JSON lines if its name ends with .jsonl, .ndjson or .json.",
)
@click.option(
    "--column", metavar="NAME", help="Column or member with the log ID (Meta.Logs[].ID). Required if there are several."
)
@destination_option
@json_option
def reconcile(source: Path, *, column: str | None, destination: str | None, as_json: bool) -> None:
    """Compare an export of Redox's delivery log with the database, and list missing messages.

    Use it after a failover to an asynchronous standby, or after a restore: messages that were answered 200 may be lost.
    Messages are compared by their log ID. Quarantined and discarded ones count as recorded.
    Exit status 1 if messages are missing: ask Redox to send them again.
    """
    lines: dict[str, int] = {}
    unusable = 0
    for number, value in _ids(source, column):
        if ID_SHAPE.fullmatch(value):
            lines.setdefault(value, number)
        else:
            unusable += 1
    if not lines:
        raise ConfigurationError(f"{source.name} contains no log ID: see --column")
    missing: list[dict[str, Any]] = []
    with opened() as session, session.engine.connect() as connection:
        left = iter(lines)
        while ids := list(islice(left, _BATCH_SIZE)):
            found = recorded(connection, session.keyring, ids, destination=destination)
            missing += [{"line": lines[each], "log_id": each} for each in ids if each not in found]
    result = {"named": len(lines), "recorded": len(lines) - len(missing), "missing": len(missing), "unusable": unusable}
    if as_json:
        output.document(result | {"messages": missing})
    else:
        output.rows(missing, COLUMNS, as_json=False, nothing="nothing is missing")
        click.echo(
            f"{result['named']:,} messages in the export, {result['recorded']:,} recorded, {len(missing):,} missing"
            + (f", {unusable:,} lines without an id" if unusable else "")
        )
    if missing:
        raise IntegrityError(f"{len(missing):,} of {len(lines):,} messages are missing: ask Redox to send them again")


def _ids(source: Path, column: str | None) -> Iterator[tuple[int, str]]:
    """Yield (line number, log ID) for each row. Raises ConfigurationError when the file cannot be read."""
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            yield from _of_json(file, column) if source.suffix.lower() in _JSON else _of_csv(file, column)
    except (UnicodeDecodeError, csv.Error) as exc:
        raise ConfigurationError(f"{source.name} is not valid CSV in UTF-8 ({type(exc).__name__})") from exc


def _of_csv(file: IO[str], column: str | None) -> Iterator[tuple[int, str]]:
    rows = csv.DictReader(file)
    name = _chosen(list(rows.fieldnames or ()), column)
    for row in rows:
        yield rows.line_num, (row[name] or "").strip()


def _of_json(file: IO[str], column: str | None) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise ConfigurationError(f"line {number} is not valid JSON") from exc
        if not isinstance(row, dict):
            raise ConfigurationError(f"line {number} is not a JSON object")
        value = row.get(column) if column in row else row[_chosen(list(row), column)]
        yield number, "" if value is None else str(value).strip()


def _chosen(names: list[str], column: str | None) -> str:
    if column is None and len(names) == 1:
        return names[0]
    if column is None or column not in names:
        shown = ", ".join(output.escaped(each)[:40] for each in names[:20]) or "none"
        raise ConfigurationError(f"the column of the log ID is not known: give --column with one of: {shown}")
    return column
