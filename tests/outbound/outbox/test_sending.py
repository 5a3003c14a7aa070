"""Facts about sending what the outbox keeps, against the fake API over real sockets."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from receiver.fault_injection.api_faults import ApiFault
from receiver.outbound import (
    AnswerLost,
    AuthenticationFailed,
    RateLimited,
    RedoxUnavailable,
    Rejected,
    Unsendable,
    Untrusted,
    UnusableAnswer,
)
from receiver.outbound.errors import OutboundError
from receiver.outbound.outbox import Caller
from receiver.outbound.outbox.sending import LaneSender, next_action
from receiver.simulator.api_exchange import SimulatedApiAnswer
from receiver.storage.queue import outbox as stored
from receiver.storage.queue.outbox import MAX_UNANSWERED, RequestOutcome
from tests.outbound.conftest import message, query
from tests.outbound.outbox.conftest import Desk

MESSAGE = UUID("0198c0de-0000-7000-8000-000000000001")


def numbered(number: int, to: str = "destination-1") -> dict[str, Any]:
    return {**message(Destinations=[{"ID": to}]), "N": number}


def numbers(desk: Desk) -> list[int]:
    return [each["N"] for each in desk.api.processed]


def test_what_is_kept_is_sent_in_order(desk: Desk) -> None:
    """One lane's requests arrive in the order in which they were kept, each once, byte for byte as they were sealed."""
    outbox = desk.outbox()
    bodies = [json.dumps(numbered(number), indent=number).encode() for number in range(5)]
    for body in bodies:
        outbox.send(body)

    assert desk.send() is False
    assert [request.body for request in desk.api.received("/endpoint")] == bodies
    assert desk.states() == ["sent"] * 5


def test_lanes_are_apart(desk: Desk) -> None:
    """What waits at one destination does not wait at another, nor for another key."""
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


def test_what_is_sent_says_how(desk: Desk) -> None:
    """The row has the answer's status and Redox's ids; the answer is sealed, and opens to what Redox said."""
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
    """The answer to a query that the outbox made is there once it is sent, and not before."""
    desk.api.respond("PatientSearch.Query", lambda asked: {"Patient": {"Demographics": {"LastName": "Canary"}}})
    outbox = desk.outbox()
    uuid = outbox.query(query())
    assert outbox.answer(uuid) is None
    desk.send()

    assert json.loads(outbox.answer(uuid) or b"")["Patient"]["Demographics"] == {"LastName": "Canary"}


def test_fhir_goes_out_too(desk: Desk) -> None:
    """A message bundle is written back with its source, in the lane of its destination."""
    bundle = {"resourceType": "Bundle", "type": "message", "entry": [{"resource": {"resourceType": "MessageHeader"}}]}
    uuid = desk.outbox().fhir("our-ehr", "Production").message("Patient", "$patient-update", bundle)
    row = desk.row(uuid)
    assert (row.lane, row.kind) == ("@outbox/lab/our-ehr/Production", "FHIR.Patient/$patient-update")
    desk.send(row.lane)
    [request] = desk.api.received("/fhir/")

    assert desk.row(uuid).state == "sent"
    assert (request.headers["redox-source-id"], request.json()) == ("source-1", bundle)


@pytest.mark.parametrize(
    ("fault", "error", "unanswered"),
    [
        (ApiFault.UNAVAILABLE, "RedoxUnavailable", 0),
        (ApiFault.RATE_LIMITED, "RateLimited", 0),
        (ApiFault.DROP_AFTER, "AnswerLost", 1),
        (ApiFault.SERVER_ERROR, "RedoxUnavailable", 1),
        (ApiFault.GATEWAY_TIMEOUT, "RedoxUnavailable", 1),
        (ApiFault.GARBAGE, "BadAnswer", 1),
        (ApiFault.REDIRECT, "UnusableAnswer", 1),
        (ApiFault.GZIP_BOMB, "UnusableAnswer", 1),
    ],
)
def test_what_may_succeed_later_waits(desk: Desk, fault: ApiFault, error: str, unanswered: int) -> None:
    """A failure that is not the request's leaves it pending for a while, and what is behind it with it; then the same
    bytes are sent again. It is told apart whether Redox may have acted on it."""
    outbox = desk.outbox()
    for number in (1, 2):
        outbox.send(numbered(number))
    desk.api.fail("/endpoint", fault)
    assert desk.send() is False
    first = desk.rows("SELECT *, ready_at > now() AS waits FROM outbound_requests ORDER BY id")[0]

    assert (first.state, first.error_class, first.attempts, first.unanswered) == ("pending", error, 1, unanswered)
    assert first.waits
    assert desk.send() is None
    desk.hurry()
    desk.send()
    assert desk.states() == ["sent", "sent"]
    bodies = [request.body for request in desk.api.received("/endpoint")]
    assert bodies[0] == bodies[1]
    assert numbers(desk)[-2:] == [1, 2]


def test_the_wait_that_was_asked_for(desk: Desk) -> None:
    """Where an answer says when to come again, it is not sooner."""
    desk.outbox().send(numbered(1))
    desk.api.fail("/endpoint", SimulatedApiAnswer(status=429, headers={"Retry-After": "500"}))
    desk.send()

    assert desk.rows("SELECT ready_at > now() + interval '480 seconds' AS waits FROM outbound_requests")[0].waits


def test_what_redox_refuses_is_dead_at_once(desk: Desk) -> None:
    """Meta.Errors even with 200, and a status of refusal: dead with what Redox said, sealed; the lane goes on."""
    outbox = desk.outbox()
    uuids = [outbox.send(numbered(number)) for number in (1, 2, 3)]
    desk.api.refuse_next({"ID": 4711, "Text": "no Canary here", "Type": "client", "Module": "Router"})
    desk.api.fail("/endpoint", SimulatedApiAnswer(status=413))
    desk.send()
    dead = {row.status: row for row in desk.rows() if row.state == "dead"}

    assert desk.states() == ["dead", "dead", "sent"]
    assert {row.error_class for row in dead.values()} == {"Rejected"}
    assert dead.keys() == {200, 413}
    assert dead[200].log_ids
    assert b"no Canary" in desk.recorder.bodies.open_answer(dead[200].answer_key, dead[200].answer, dead[200].uuid)
    assert outbox.answer(uuids[0]) is None
    assert "Canary" not in str([row.told for row in desk.audit()])


def test_dead_after_so_many_that_redox_may_have_had(desk: Desk) -> None:
    """Answers that are lost end with the request dead; the lane goes on. What never got so far uses none of them up."""
    outbox = desk.outbox()
    for number in (1, 2):
        outbox.send(numbered(number))
    desk.execute(
        "UPDATE outbound_requests SET attempts = 500, unanswered = :most WHERE id = 1", most=MAX_UNANSWERED - 1
    )
    desk.api.fail("/endpoint", ApiFault.UNAVAILABLE)
    desk.send()
    assert desk.states() == ["pending", "pending"]
    desk.hurry()
    desk.api.fail("/endpoint", ApiFault.DROP_AFTER)
    desk.send()

    assert desk.states() == ["dead", "sent"]
    assert desk.rows()[0].error_class == "AnswerLost"


def test_a_key_that_is_refused_costs_no_request(desk: Desk) -> None:
    """Requests wait, and say why, until the key is put right; then they are sent with it."""
    desk.outbox().send(numbered(1))
    desk.api.register_oauth("client-1", {"keys": []})
    desk.send()
    [row] = desk.rows()
    assert (row.state, row.error_class, row.status, row.unanswered) == ("pending", "AuthenticationFailed", 400, 0)
    desk.add_key("lab", legacy=True, replace=True)
    desk.hurry()
    desk.send()

    assert desk.states() == ["sent"]


def test_a_key_that_cannot_be_opened_costs_no_request(desk: Desk) -> None:
    """A key that something else has changed is not used; what waits for it says so."""
    desk.outbox().send(numbered(1))
    desk.execute("UPDATE api_keys SET source_id = 'another'")
    desk.send()
    [row] = desk.rows()

    assert (row.state, row.error_class) == ("pending", "IntegrityError")
    assert desk.api.requests == []


def test_an_attempt_that_was_lost_counts_and_is_made_again(desk: Desk) -> None:
    """A request whose attempt has no end is sent again, the same bytes, at once; after the last it is dead."""
    desk.outbox().send(numbered(1))
    lost = "UPDATE outbound_requests SET started_at = now(), attempts = attempts + 1, unanswered = :count"
    desk.execute(lost, count=0)
    desk.send()
    [row] = desk.rows()
    assert (row.state, row.attempts, row.unanswered) == ("sent", 2, 1)

    desk.outbox().send(numbered(2))
    desk.execute(f"{lost} WHERE state = 'pending'", count=MAX_UNANSWERED - 1)
    desk.send()
    assert desk.rows()[1].state == "dead"
    assert desk.rows()[1].error_class == "WorkerLost"
    assert numbers(desk) == [1]


def test_a_lease_that_is_lost_writes_nothing(desk: Desk) -> None:
    """Who comes back late records nothing: the request is the other's, and is sent again."""
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


def test_a_lane_is_one_owners(desk: Desk) -> None:
    """As long as a lease holds nobody else gets the lane; when it is over it is taken over with a higher epoch."""
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


def test_a_request_opens_where_it_belongs_alone(desk: Desk) -> None:
    """One whose seal does not hold, or that was moved to another key, is dead and not sent; the lane goes on."""
    desk.add_key("other", environment="production")
    outbox = desk.outbox()
    outbox.send(numbered(1), key="lab")
    outbox.send(numbered(2), key="lab")
    desk.execute("UPDATE outbound_requests SET api_key = 'other' WHERE id = 1")
    desk.send()

    assert desk.states() == ["dead", "sent"]
    assert desk.rows()[0].error_class == "IntegrityError"
    assert numbers(desk) == [2]


def test_every_attempt_is_in_the_audit_before_and_after(desk: Desk) -> None:
    """Who sent what kind of thing where, how long and with which digest, and what came of it; nothing of a patient."""
    caller = Caller(name="handler:reply", message_uuid=MESSAGE)
    uuid = desk.outbox(caller).send(numbered(1))
    desk.api.fail("/endpoint", ApiFault.SERVER_ERROR)
    desk.send()
    desk.hurry()
    desk.send()
    told = desk.audit()
    row = desk.row(uuid)

    assert [(each.action, each.outcome, each.told["attempt"]) for each in told] == [
        ("outbound.send", "begun", 1),
        ("outbound.send", "failed", 1),
        ("outbound.send", "begun", 2),
        ("outbound.send", "sent", 2),
    ]
    assert {(each.actor, each.message_uuid, each.subject) for each in told} == {
        ("worker:worker-1", MESSAGE, f"outbound_requests:{row.id}")
    }
    assert told[0].told == told[2].told | {"attempt": 1}
    assert told[0].told.keys() == {"api_key", "kind", "to", "attempt", "length", "sha256"}
    assert told[3].told == {"attempt": 2, "status": 200, "error": None, "log_ids": row.log_ids}
    assert (row.message_uuid, row.created_by) == (MESSAGE, "handler:reply")
    assert "Canary" not in str(told)


REFUSED = RequestOutcome(state="dead")


@pytest.mark.parametrize(
    ("error", "state", "unanswered"),
    [
        (Rejected("x", status=400), "dead", False),
        (Unsendable("x"), "dead", False),
        (RateLimited("x", not_processed=True), "pending", False),
        (AuthenticationFailed("x", status=401), "pending", False),
        (Untrusted("x", not_processed=True), "pending", False),
        (RedoxUnavailable("x", not_processed=True), "pending", False),
        (RedoxUnavailable("x"), "pending", True),
        (AnswerLost("x"), "pending", True),
        (UnusableAnswer("x"), "pending", True),
        (ValueError("ours"), "pending", True),
    ],
)
def test_judge(error: OutboundError, state: str, unanswered: bool) -> None:
    """What becomes of each kind of failure."""
    judged = next_action(error, REFUSED, attempt=1, unanswered=0)

    assert (judged.state, judged.unanswered) == (state, unanswered)
    assert (judged.pause is not None) is (state == "pending")
    last = next_action(error, REFUSED, attempt=1, unanswered=MAX_UNANSWERED - 1)
    assert last.state == ("dead" if unanswered else state)
