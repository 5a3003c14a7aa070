"""`audit export`: the sealed rows in the log's order, in three formats, with a cursor."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from fhir.resources.R4B.auditevent import AuditEvent as FhirAuditEvent

from receiver.cli.commands import audit_export
from receiver.cli.session import opened
from receiver.keyring import Keyring
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence.audit_log import AuditChain, AuditEvent, write
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.seals import AuditSealer
from receiver.storage.operations.queries.export_queries import log_range
from tests.cli.conftest import ACTOR, Commands
from tests.storage.door import Door, body
from tests.storage.hand import arrive

WHY = "ask Mr. Test"


@pytest.fixture
def busy(door: Door, ledger: MessageLedger, run: Commands) -> int:
    """Rows of several writers: a message, its correction with a reason, changes. Returns the message's id."""
    (number,) = arrive(door, ledger, b"no json")
    run("messages", "discard", str(number), "--reason", WHY)
    run("source", "add", "clinic", "22222222-2222-4222-8222-222222222222")
    return number


def export(run: Commands, *options: str, format_: str = "jsonl") -> tuple[str, str]:
    """Return the export and the cursor after it."""
    done = run("audit", "export", "--format", format_, *options)
    cursor = re.search(r"next: --after (\d+)", done.stderr)
    assert cursor, done.stderr
    return done.stdout, cursor[1]


def lines(text: str) -> list[Any]:
    """Return the values of a text with one JSON value a line."""
    return [json.loads(line) for line in text.splitlines()]


def test_every_sealed_row_once_in_the_order_of_the_log(busy: int, door: Door, run: Commands) -> None:
    """What one export leaves, the next continues with; each row is at the place where its proof says it is."""
    first, cursor = export(run, "--limit", "2")
    assert cursor == "1"
    second, cursor = export(run, "--after", cursor, "--limit", "1")
    third, cursor = export(run, "--after", cursor)
    found = lines(first + second + third)
    assert [each["log_index"] for each in found] == list(range(int(cursor) + 1))
    total = door.value("SELECT count(*) FROM audit_events")
    assert len({each["id"] for each in found}) == len(found) == total - 1  # all but the row of the third export
    sealed = door.value("SELECT max(size) FROM audit_seals")
    assert sealed == len(found)
    for each in found:
        assert (
            door.value(
                "SELECT first_leaf + :n - first_n FROM audit_seal_writers "
                "WHERE writer = :writer AND :n BETWEEN first_n AND last_n",
                n=each["n"],
                writer=each["writer"],
            )
            == each["log_index"]
        )
    last, _ = export(run, "--after", cursor)
    assert [each["action"] for each in lines(last)] == ["audit.export"]


def test_a_late_row_comes_after_the_cursor(busy: int, door: Door, keyring: Keyring, run: Commands) -> None:
    """A row whose number is smaller than that of an exported one, but which commits later, is not left out."""
    with door.engine.begin() as late:
        chain = AuditChain(keyring, Sealer(keyring))
        write(late, chain, [AuditEvent(action="late.row", outcome="done", at=door.now, actor="redox")])
        door.enable()
        exported, cursor = export(run)
    ids = [each["id"] for each in lines(exported)]
    continued = lines(export(run, "--after", cursor)[0])
    (row,) = (each for each in continued if each["action"] == "late.row")
    assert row["id"] < max(ids)
    assert row["id"] not in ids


def test_the_columns(busy: int, door: Door, run: Commands) -> None:
    """Columns have the table's names, the detail is a value; neither notes nor MACs are exported."""
    text, _ = export(run)
    assert WHY not in text
    (row,) = (each for each in lines(text) if each["action"] == "message.discard")
    assert not {"mac", "mac_key", "note", "note_key"} & row.keys()
    (listed,) = run.json("audit", "list", "--action", "message.discard")
    assert {name: row[name] for name in ("id", "actor", "message_uuid", "noted", "detail")} == {
        name: listed[name] for name in ("id", "actor", "message_uuid", "noted", "detail")
    }
    (received,) = (each for each in lines(text) if each["action"] == "message.receive")
    assert received["detail"]["credentials"] == [1]


def test_the_export_is_recorded(busy: int, run: Commands) -> None:
    """Its row says who, which rows and in which format, and a review shows it."""
    _, cursor = export(run, "--limit", "3", format_="csv")
    (row,) = run.json("audit", "list", "--action", "audit.export")
    assert (row["actor"], row["outcome"]) == (ACTOR, "done")
    assert row["detail"] == {"format": "csv", "count": 3, "first": 0, "last": int(cursor)}
    assert run.json("audit", "review")[0]["action"] == "audit.export"
    assert run.json("audit", "verify")["first_bad"] is None


def test_it_is_recorded_before_the_first_row_is_written(busy: int, door: Door, run: Commands) -> None:
    """When the first row is written, another session already sees the audit row."""
    seen: list[int] = []

    class Watched(io.BytesIO):
        def writelines(self, lines: Iterable[Any], /) -> None:
            seen.extend(door.value("SELECT count(*) FROM audit_events WHERE action = 'audit.export'") for _ in lines)

    with opened() as session, session.engine.connect() as connection:
        AuditSealer(session.engine, session.keyring).seal(wait=True)
        wanted = log_range(connection, after=None, limit=None)
        assert wanted is not None
        assert audit_export._export(session, wanted, "jsonl", Watched()) == len(seen)
    assert set(seen) == {1}


def test_csv_is_safe_for_spreadsheets(busy: int, door: Door, keyring: Keyring, run: Commands) -> None:
    """No cell begins a formula, lines end in CRLF, and what holds commas and quotes is read back whole."""
    with door.engine.begin() as connection:
        write(
            connection,
            AuditChain(keyring, Sealer(keyring)),
            [
                AuditEvent(action="a.b", outcome="done", at=door.now, actor=f'{begin}HYPERLINK("x","y")')
                for begin in ("=", "+", "-", "@", "\t", "\r")
            ],
        )
    text = run("audit", "export", "--format", "csv").stdout_bytes.decode()
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    assert text.startswith("log_index,id,writer,n,at,action,")
    assert text.count("\r\n") == len(found) + 1
    actors = [each["actor"] for each in found if each["action"] == "a.b"]
    assert actors == [f'\'{begin}HYPERLINK("x","y")' for begin in ("=", "+", "-", "@", "\t", "\r")]
    assert not [cell for each in found for cell in each.values() if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    (received,) = (each for each in found if each["action"] == "message.receive")
    assert json.loads(received["detail"])["credentials"] == [1]
    assert received["subject"] == ""


def test_fhir_events_are_valid(busy: int, door: Door, ledger: MessageLedger, run: Commands) -> None:
    """Each line is an AuditEvent for fhir.resources, with the same id each time, and without a patient."""
    arrive(door, ledger, body(outside="MRN-4711"))
    run("messages", "show", str(busy), "--payload", "--reason", WHY)
    text, _ = export(run, format_="fhir")
    rows = lines(export(run)[0])
    events = [FhirAuditEvent.model_validate_json(line) for line in text.splitlines()]
    assert len({event.id for event in events}) == len(events)
    assert lines(text) == lines(export(run, "--limit", str(len(events)), format_="fhir")[0])
    assert [str(each["subtype"][-1]["code"]) for each in lines(text)] == [
        each["action"] for each in rows[: len(events)]
    ]
    assert "MRN-4711" not in text
    assert WHY not in text
    (seen,) = (each for each in lines(text) if each["subtype"][-1]["code"] == "message.disclose")
    assert seen["purposeOfEvent"][0]["coding"][0]["code"] == "BTG"
    assert seen["agent"][0]["who"]["display"] == ACTOR
    uuid = door.value("SELECT uuid FROM messages WHERE id = :id", id=busy)
    assert seen["entity"][0]["what"]["identifier"]["value"] == f"urn:uuid:{uuid}"


def test_to_a_file(busy: int, run: Commands, tmp_path: Path) -> None:
    """A new file of mode 0600; one that exists is not touched."""
    path = tmp_path / "audit.jsonl"
    text, _ = export(run, "--out", str(path))
    assert text == ""
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    assert len(lines(before.decode())) > 3
    assert "cannot be created" in run.fails("audit", "export", "--format", "jsonl", "--out", str(path), status=2)
    assert path.read_bytes() == before


def test_a_cursor_of_another_database(busy: int, door: Door, run: Commands) -> None:
    """A cursor beyond the log is an error, not an empty export, and is not recorded."""
    assert "another database" in run.fails("audit", "export", "--format", "jsonl", "--after", "4711")
    assert run.json("audit", "list", "--action", "audit.export") == []


def test_a_deleted_row_is_noticed(busy: int, door: Door, keyring: Keyring, run: Commands) -> None:
    """The rows that are there are exported, and the exit status is 1."""
    AuditSealer(door.engine, keyring).seal(wait=True)
    door.rows("ALTER TABLE audit_events DISABLE TRIGGER USER")
    for each in door.rows(
        "SELECT inhrelid::regclass::text AS part FROM pg_inherits WHERE inhparent = 'audit_events'::regclass"
    ):
        door.rows(f"ALTER TABLE {each.part} DISABLE TRIGGER USER")
    door.rows("DELETE FROM audit_events WHERE action = 'message.discard'")
    done = run("audit", "export", "--format", "jsonl", status=1)
    assert "1 sealed rows" in done.stderr
    assert "audit verify" in done.stderr
    assert "message.receive" in done.stdout
