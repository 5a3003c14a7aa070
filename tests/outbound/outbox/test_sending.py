"""Sending requests of the outbox, against the fake API over real sockets: order, leases, audit."""

from __future__ import annotations

import json
from uuid import UUID

from sqlalchemy import text

from receiver.fault_injection.api_faults import ApiFault
from receiver.outbound.outbox import Caller
from receiver.outbound.outbox.sending import LaneSender
from receiver.storage.queue import outbox as stored
from receiver.storage.queue.outbox import RequestOutcome
from tests.outbound.conftest import query
from tests.outbound.outbox.conftest import Desk
from tests.outbound.outbox.numbered import numbered, numbers

MESSAGE = UUID("0198c0de-0000-7000-8000-000000000001")


def test_order(desk: Desk) -> None:
    """Requests of a lane arrive once each, in the order in which they were recorded, byte for byte."""
    outbox = desk.outbox()
    bodies = [json.dumps(numbered(number), indent=number).encode() for number in range(5)]
    for body in bodies:
        outbox.send(body)

    assert desk.send() is False
    assert [request.body for request in desk.api.received("/endpoint")] == bodies
    assert desk.states() == ["sent"] * 5


def test_lanes_are_apart(desk: Desk) -> None:
    """A lane that waits does not delay another destination or another key."""
    desk.add_key("other", environment="production")
    outbox = desk.outbox()
    outbox.send(numbered(1), key="lab")
    outbox.send(numbered(2, "destination-2"), key="lab")
    outbox.send(numbered(3), key="other")
    with desk.engine.connect() as connection:
        assert stored.due(connection) == [
            "@outbox/lab/destination-1",
            "@outbox/lab/destination-2",
            "@outbox/other/destination-1",
        ]
    desk.api.fail("/endpoint", ApiFault.UNAVAILABLE)
    desk.send("@outbox/lab/destination-1")
    desk.send("@outbox/lab/destination-2")
    desk.send("@outbox/other/destination-1")

    assert numbers(desk) == [2, 3]
    assert desk.states() == ["pending", "sent", "sent"]


def test_row_of_a_sent_request(desk: Desk) -> None:
    """The row has the status and Redox's ids. The answer is sealed, and opens to Redox's response."""
    outbox = desk.outbox()
    uuid = outbox.send(numbered(1))
    desk.send()
    row = desk.row(uuid)
    answer = outbox.answer(uuid)

    assert (row.status, row.attempts, row.unanswered, row.error_class) == (200, 1, 0, None)
    assert answer is not None
    assert json.loads(answer)["Meta"]["Logs"][0]["ID"] == row.log_ids[0]
    assert b"Canary" not in row.answer + row.request


def test_a_query_is_answered_later(desk: Desk) -> None:
    """The answer to a query of the outbox is available once the query was sent, not before."""
    desk.api.respond("PatientSearch.Query", lambda asked: {"Patient": {"Demographics": {"LastName": "Canary"}}})
    outbox = desk.outbox()
    uuid = outbox.query(query())
    assert outbox.answer(uuid) is None
    desk.send()

    assert json.loads(outbox.answer(uuid) or b"")["Patient"]["Demographics"] == {"LastName": "Canary"}


def test_fhir(desk: Desk) -> None:
    """A message bundle is sent with its source, in the lane of its destination."""
    bundle = {"resourceType": "Bundle", "type": "message", "entry": [{"resource": {"resourceType": "MessageHeader"}}]}
    uuid = desk.outbox().fhir("our-ehr", "Production").message("Patient", "$patient-update", bundle)
    row = desk.row(uuid)
    assert (row.lane, row.kind) == ("@outbox/lab/our-ehr/Production", "FHIR.Patient/$patient-update")
    desk.send(row.lane)
    [request] = desk.api.received("/fhir/")

    assert desk.row(uuid).state == "sent"
    assert (request.headers["redox-source-id"], request.json()) == ("source-1", bundle)


def test_a_lost_lease(desk: Desk) -> None:
    """A worker that lost its lease records nothing: another worker sends the request."""
    desk.outbox().send(numbered(1))
    with desk.engine.begin() as connection:
        late = stored.claim(connection, "@outbox/lab/destination-1", "frozen", 0)
    assert late is not None
    with desk.engine.begin() as connection:
        head = stored.head(connection, late)
        assert head is not None
        attempt = stored.start(connection, late, head.id)
        assert attempt == 1
    assert desk.send() is False
    with desk.engine.begin() as connection:
        assert not stored.end(connection, late, head.id, attempt, RequestOutcome(state="dead"))
        assert stored.head(connection, late) is None
        assert stored.start(connection, late, head.id) is None

    assert LaneSender(desk.engine, desk.clients, desk.recorder, name="frozen").run(late, lambda: True) is False
    assert desk.states() == ["sent"]


def test_leases(desk: Desk) -> None:
    """While a lease is valid no other worker gets the lane. Afterwards it is claimed with a higher epoch."""
    desk.outbox().send(numbered(1))
    with desk.engine.begin() as connection:
        first = stored.claim(connection, "@outbox/lab/destination-1", "a", 60)
        assert stored.claim(connection, "@outbox/lab/destination-1", "b", 60) is None
        assert stored.due(connection) == []
        connection.execute(text("UPDATE lanes SET lease_until = now() - interval '1 second'"))
        assert stored.due(connection) == ["@outbox/lab/destination-1"]
        second = stored.claim(connection, "@outbox/lab/destination-1", "b", 60)

    assert first is not None
    assert second is not None
    assert second.epoch == first.epoch + 1


def test_audit_rows(desk: Desk) -> None:
    """Each attempt has an audit row before and after it, with its digest and outcome, without patients' data."""
    caller = Caller(name="handler:reply", message_uuid=MESSAGE)
    uuid = desk.outbox(caller).send(numbered(1))
    desk.api.fail("/endpoint", ApiFault.SERVER_ERROR)
    desk.send()
    desk.hurry()
    desk.send()
    rows = desk.audit()
    row = desk.row(uuid)

    assert [(each.action, each.outcome, each.detail_json["attempt"]) for each in rows] == [
        ("outbound.send", "begun", 1),
        ("outbound.send", "failed", 1),
        ("outbound.send", "begun", 2),
        ("outbound.send", "sent", 2),
    ]
    assert {(each.actor, each.message_uuid, each.subject) for each in rows} == {
        ("worker:worker-1", MESSAGE, f"outbound_requests:{row.id}")
    }
    assert rows[0].detail_json == rows[2].detail_json | {"attempt": 1}
    assert rows[0].detail_json.keys() == {"api_key", "kind", "to", "attempt", "length", "digest"}
    assert rows[3].detail_json == {"attempt": 2, "status": 200, "error": None, "log_ids": row.log_ids}
    assert (row.message_uuid, row.created_by) == (MESSAGE, "handler:reply")
    assert "Canary" not in str(rows)
