"""Direct calls that are recorded."""

from __future__ import annotations

import io
import json
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from receiver.fault_injection.api_faults import ApiFault
from receiver.outbound import RedoxUnavailable, Rejected
from receiver.outbound.calls import Call
from receiver.outbound.outbox import Caller, RecordedClient
from receiver.outbound.outbox.recording import OutboundRecorder
from tests.outbound.conftest import message, query
from tests.outbound.outbox.conftest import Desk

MESSAGE = UUID("0198c0de-0000-7000-8000-000000000001")


@pytest.fixture
def redox(desk: Desk) -> RecordedClient:
    return RecordedClient(desk.clients, desk.recorder, "lab", Caller(name="handler:x", message_uuid=MESSAGE))


def opened(desk: Desk, row: Any) -> Call:
    return desk.recorder.bodies.open_call(row.request_key, row.request, row.uuid, row.api_key)


def test_a_call_is_on_record(desk: Desk, redox: RecordedClient) -> None:
    """The row has the call and its outcome, the audit rows have who and when, and the bodies are sealed."""
    desk.api.respond("PatientSearch.Query", lambda asked: {"Patient": {"LastName": "Canary"}})
    answer = redox.query(query())
    [row] = desk.rows()
    begun, ended = desk.audit()

    assert answer.data["Patient"] == {"LastName": "Canary"}
    assert (row.state, row.call, row.kind, row.lane, row.status) == ("sent", "query", "PatientSearch.Query", None, 200)
    assert (row.message_uuid, row.created_by) == (MESSAGE, "handler:x")
    assert opened(desk, row).body == desk.api.received("/endpoint")[0].body
    assert desk.recorder.bodies.open_answer(row.answer_key, row.answer, row.uuid) == answer.body
    assert [(each.action, each.outcome, each.actor) for each in (begun, ended)] == [
        ("outbound.query", "begun", "handler:x"),
        ("outbound.query", "sent", "handler:x"),
    ]
    assert begun.detail_json["to"] == ["destination-1"]
    assert "Canary" not in str((row.lane, begun, ended))


def test_a_call_that_fails_is_on_record(desk: Desk, redox: RecordedClient) -> None:
    """The error is raised, and is in the row. The outbox does not retry the call."""
    desk.api.refuse_next({"ID": 1, "Text": "no Canary", "Type": "client", "Module": "Router"})
    with pytest.raises(Rejected):
        redox.send(message())
    desk.api.fail("/endpoint", ApiFault.SERVER_ERROR)
    with pytest.raises(RedoxUnavailable):
        redox.send(message())
    rows = desk.rows()

    assert [(row.state, row.error_class, row.status) for row in rows] == [
        ("dead", "Rejected", 200),
        ("dead", "RedoxUnavailable", 500),
    ]
    assert [each.outcome for each in desk.audit()] == ["begun", "failed", "begun", "failed"]
    assert "Canary" not in str([each.detail_json for each in desk.audit()])


def test_fhir_and_files_are_on_record(desk: Desk, redox: RecordedClient) -> None:
    """A read is recorded by its resource type, with its id sealed. A file is recorded with its name and media type."""
    desk.api.resources["Patient", "canary-id"] = {"resourceType": "Patient"}
    redox.fhir("our-ehr", "Production").read("Patient", "canary-id")
    uri = redox.upload(io.BytesIO(b"content"), filename="canary.txt")
    read, file = desk.rows()

    assert (read.kind, read.call) == ("FHIR.Patient", "fhir")
    assert "canary" not in str([each.detail_json for each in desk.audit()]) + str((read.kind, file.kind))
    assert opened(desk, read).path.endswith("/Patient/canary-id")
    assert (file.call, opened(desk, file).body) == ("upload", b"content")
    assert desk.api.uploads[uri] == b"content"


def test_no_call_without_a_record(desk: Desk, redox: RecordedClient) -> None:
    """A call that cannot be recorded is not made."""
    desk.execute("ALTER TABLE audit_events RENAME TO elsewhere")
    with pytest.raises(SQLAlchemyError):
        redox.send(message())

    assert desk.api.requests == []
    assert desk.rows() == []


def test_an_outcome_that_is_not_recorded(desk: Desk, redox: RecordedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller gets the answer, and must not repeat the call. The row shows it as unfinished."""

    def break_it(asked: dict[str, Any]) -> dict[str, Any]:
        with desk.engine.begin() as connection:
            connection.execute(text("ALTER TABLE audit_events RENAME TO elsewhere"))
        return {"Patient": None}

    desk.api.respond("PatientSearch.Query", break_it)
    assert redox.query(query()).data["Patient"] is None
    [row] = desk.rows()
    assert (row.state, row.error_class) == ("dead", "Unfinished")


def test_the_chain_of_calls_holds(desk: Desk, redox: RecordedClient) -> None:
    """After a failed transaction a new audit chain begins, so the audit verifies."""
    redox.send(message())
    with pytest.raises(ZeroDivisionError), desk.recorder.transaction():
        raise ZeroDivisionError
    redox.send(message())
    numbers = desk.rows(
        "SELECT writer, array_agg(n ORDER BY id) AS n FROM audit_events WHERE action LIKE 'outbound.%' GROUP BY writer"
    )

    assert sorted(row.n for row in numbers) == [[1, 2], [1, 2]]


def test_a_reason_is_sealed_in_the_audit(desk: Desk) -> None:
    """A reason is stored once, sealed, with the audit row of the beginning."""
    RecordedClient(
        desk.clients,
        OutboundRecorder(desk.engine, desk.keyring),
        "lab",
        Caller(name="ada@host", reason="canary reason"),
    ).send(message())
    begun, ended = desk.audit()

    assert begun.note is not None
    assert ended.note is None
    assert b"canary" not in begun.note
    assert json.loads(begun.detail)["api_key"] == "lab"
