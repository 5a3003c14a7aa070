"""Failures of requests of the outbox: what is retried, what waits, and what is dead."""

from __future__ import annotations

import pytest

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
from receiver.outbound.outbox.sending import next_action
from receiver.simulator.api_exchange import SimulatedApiAnswer
from receiver.storage.queue.outbox import MAX_UNANSWERED, RequestOutcome
from tests.outbound.outbox.conftest import Desk
from tests.outbound.outbox.numbered import numbered, numbers


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
def test_temporary_failures(desk: Desk, fault: ApiFault, error: str, unanswered: int) -> None:
    """A failure that the request did not cause leaves it pending with a retry time, and the lane waits. The retry has
    the same bytes. `unanswered` counts attempts that Redox may have processed."""
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


def test_retry_after(desk: Desk) -> None:
    """Retry-After is obeyed."""
    desk.outbox().send(numbered(1))
    desk.api.fail("/endpoint", SimulatedApiAnswer(status=429, headers={"Retry-After": "500"}))
    desk.send()

    assert desk.rows("SELECT ready_at > now() + interval '480 seconds' AS waits FROM outbound_requests")[0].waits


def test_rejections(desk: Desk) -> None:
    """A rejection, by Meta.Errors or by status, is dead at once, with Redox's answer sealed. The lane continues."""
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
    assert "Canary" not in str([row.detail_json for row in desk.audit()])


def test_unanswered_attempts_are_limited(desk: Desk) -> None:
    """A request is dead after MAX_UNANSWERED attempts that Redox may have processed. Other failures do not count."""
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


def test_a_key_that_is_rejected(desk: Desk) -> None:
    """While a key is rejected, requests wait and name the reason. They are sent once the key is replaced."""
    desk.outbox().send(numbered(1))
    desk.api.register_oauth("client-1", {"keys": []})
    desk.send()
    [row] = desk.rows()
    assert (row.state, row.error_class, row.status, row.unanswered) == ("pending", "AuthenticationFailed", 400, 0)
    desk.add_key("lab", legacy=True, replace=True)
    desk.hurry()
    desk.send()

    assert desk.states() == ["sent"]


def test_a_key_that_cannot_be_opened(desk: Desk) -> None:
    """A key whose row was changed is not used. Requests wait and name the reason."""
    desk.outbox().send(numbered(1))
    desk.execute("UPDATE api_keys SET source_id = 'another'")
    desk.send()
    [row] = desk.rows()

    assert (row.state, row.error_class) == ("pending", "IntegrityError")
    assert desk.api.requests == []


def test_attempts_without_an_outcome(desk: Desk) -> None:
    """An attempt without an outcome is repeated at once with the same bytes. After the last one it is dead."""
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


def test_requests_that_cannot_be_opened(desk: Desk) -> None:
    """A request whose seal fails, or that was moved to another key, is dead and not sent. The lane continues."""
    desk.add_key("other", environment="production")
    outbox = desk.outbox()
    outbox.send(numbered(1), key="lab")
    outbox.send(numbered(2), key="lab")
    desk.execute("UPDATE outbound_requests SET api_key = 'other' WHERE id = 1")
    desk.send()

    assert desk.states() == ["dead", "sent"]
    assert desk.rows()[0].error_class == "IntegrityError"
    assert numbers(desk) == [2]


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
def test_next_action(error: OutboundError, state: str, unanswered: bool) -> None:
    """The next action for each kind of failure."""
    judged = next_action(error, RequestOutcome(state="dead"), attempt=1, unanswered=0)

    assert (judged.state, judged.unanswered) == (state, unanswered)
    assert (judged.pause is not None) is (state == "pending")
    last = next_action(error, RequestOutcome(state="dead"), attempt=1, unanswered=MAX_UNANSWERED - 1)
    assert last.state == ("dead" if unanswered else state)
