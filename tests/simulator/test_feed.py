"""Feeds: order, retries, duplicates, queries and limits."""

from __future__ import annotations

import json
from hashlib import sha256
from threading import Event, Thread
from typing import Any

import pytest

from receiver.protocol.reading import read
from receiver.simulator.attempt_log import AttemptLog
from receiver.simulator.fake_redox import FakeRedox
from receiver.simulator.feed import RETRY_AFTER, FeedSimulator, with_attempt
from tests.simulator import SOURCE
from tests.support.scripted_endpoint import ScriptedEndpoint, answer, hang_up, late


def redox(url: str, timeout: float = 10) -> FakeRedox:
    return FakeRedox(url, "main", "a-token-of-sufficient-length", source_id=SOURCE, timeout=timeout)


def feed(endpoint: ScriptedEndpoint, *, timeout: float = 10, **options: Any) -> FeedSimulator:
    return FeedSimulator(redox(endpoint.url, timeout), **{"time_scale": 0.0, **options})


body = redox("http://127.0.0.1:9").body


def test_a_failure_pauses_the_feed_and_keeps_the_order() -> None:
    """After 503 the same message is sent again with a new attempt id, and the next message only after it."""
    with ScriptedEndpoint(answer(200), answer(503), answer(503), answer(200)) as endpoint, feed(endpoint) as one:
        assert one.run(body("PatientAdmin.Arrival", seed=seed) for seed in range(3))
        assert endpoint.connections == 1
    got = [read(received.body) for received in endpoint.received]
    first, second, third = (read(body("PatientAdmin.Arrival", seed=seed)).log_id for seed in range(3))
    assert [message.log_id for message in got] == [first, second, second, second, third]
    assert len({message.attempt_id for message in got}) == 5
    assert len({message.outside for message in got[1:4]}) == 1
    assert [attempt.status for attempt in one.ledger.attempts] == [200, 503, 503, 200, 200]


def test_the_attempt_log() -> None:
    """The log has the digest of the sent bytes, ids, ordered times and statuses. Its dump has no body."""
    with ScriptedEndpoint(answer(500)) as endpoint, feed(endpoint, name="adt") as one:
        sent = one.deliver(body("PatientAdmin.Arrival"))
    first, second = one.ledger.of(sent.message)
    assert [attempt.sha256 for attempt in (first, second)] == [
        sha256(received.body).hexdigest() for received in endpoint.received
    ]
    assert (first.feed, first.number, second.number, first.kind) == ("adt", 1, 2, "PatientAdmin.Arrival")
    assert first.attempt_id != second.attempt_id == read(sent.body).attempt_id
    assert first.answered_at is not None
    assert second.answered_at is not None
    assert first.sent_at <= first.answered_at <= second.sent_at <= second.answered_at
    lines = [json.loads(line) for line in one.ledger.lines()]
    assert [line["status"] for line in lines] == [500, 200]
    assert lines[1]["size"] == len(sent.body)


@pytest.mark.parametrize("misbehaviour", [hang_up, answer(400), answer(401), answer(504)])
def test_failures_are_retried(misbehaviour: Any) -> None:
    """A closed connection, a 4xx and a 5xx are all retried."""
    with ScriptedEndpoint(misbehaviour) as endpoint, feed(endpoint) as one:
        sent = one.deliver(body("Device.New"))
    assert sent.answer.accepted
    assert sent.attempts == 2


def test_a_late_response() -> None:
    """A message without a response in time is sent again, though the destination has received it."""
    arrived = Event()
    with ScriptedEndpoint(late(arrived)) as endpoint, feed(endpoint, timeout=0.2) as one:
        sent = one.deliver(body("Device.New"))
        arrived.set()
    assert (sent.attempts, len(endpoint.received)) == (2, 2)
    assert one.ledger.attempts[0].error == "TimeoutError"


def test_a_lost_response() -> None:
    """The destination answers 200, the response is lost, and the feed sends the message again."""
    with ScriptedEndpoint() as endpoint, feed(endpoint) as one:
        sent = one.deliver(body("Device.New"), lose_answers=2)
    assert sent.attempts == 3
    assert [attempt.error for attempt in one.ledger.attempts] == ["AnswerLost", "AnswerLost", None]
    assert len({read(received.body).outside for received in endpoint.received}) == 1


def test_a_duplicate_differs_in_meta_alone() -> None:
    """A duplicate has the same log id and another attempt id; all other bytes are the same."""
    with ScriptedEndpoint() as endpoint, feed(endpoint) as one:
        sent = one.deliver(body("Order.New"))
        again = one.duplicate(sent)
    first, second = (read(received.body) for received in endpoint.received)
    assert (first.log_id, first.outside) == (second.log_id, second.outside)
    assert first.attempt_id != second.attempt_id
    assert again.message == sent.message
    assert [attempt.number for attempt in one.ledger.of(sent.message)] == [1, 2]


def test_bodies_without_ids() -> None:
    """A body without Meta is sent again unchanged. Its digest is its id in the log."""
    with ScriptedEndpoint(answer(503), answer(200), answer(503)) as endpoint, feed(endpoint) as one:
        bundle = body("FHIR.ResultCreated")
        assert one.deliver(bundle).message == f"sha256:{sha256(bundle).hexdigest()}"
        assert one.deliver(b"\xff not json").attempts == 2
    assert [received.body for received in endpoint.received] == [bundle, bundle, b"\xff not json", b"\xff not json"]


def test_a_sign_on_has_no_log_id() -> None:
    """A SignOn has a session instead of a log id, so its digest is its id in the log."""
    with ScriptedEndpoint() as endpoint, feed(endpoint) as one:
        signed_on = body("SSO.Sign-on")
        assert one.deliver(signed_on).message == f"sha256:{sha256(signed_on).hexdigest()}"
    assert one.ledger.attempts[0].kind == "SSO.Sign-on"


def test_a_query_is_sent_once() -> None:
    """The failure of a query is returned, and the feed continues."""
    with ScriptedEndpoint(answer(500), answer(200)) as endpoint, feed(endpoint) as one:
        assert one.run([body("PatientSearch.Query"), body("Device.New")])
    assert [attempt.status for attempt in one.ledger.attempts] == [500, 200]


def test_limits() -> None:
    """After the limit of attempts or time the feed stops, and sends nothing that comes later."""
    with ScriptedEndpoint(*[answer(503)] * 9) as endpoint, feed(endpoint, attempts=3) as one:
        assert not one.run(body("Device.New", seed=seed) for seed in range(2))
        assert len(endpoint.received) == 3
        with feed(endpoint, deadline=5.0, time_scale=1.0) as timed:
            assert timed.deliver(body("Device.New")).attempts == 2  # the next is due after ten seconds


def test_stopping_ends_a_pause() -> None:
    """A feed that waits for a retry can be stopped from another thread."""
    with ScriptedEndpoint(*[answer(503)] * 3) as endpoint, feed(endpoint, time_scale=60.0) as one:
        running = Thread(target=one.run, args=([body("Device.New")],))
        running.start()
        for _ in range(1000):  # two sendings, then it pauses for ten minutes
            if len(one.ledger.attempts) == 2:
                break
            running.join(0.01)
        one.stop()
        running.join(30)
        assert not running.is_alive()
        assert len(one.ledger.attempts) == 2


def test_the_pauses_are_redoxs() -> None:
    """The pauses are Redox's documented ones, times the scale; then one minute each."""
    waits: list[float] = []

    class Patient(Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    with ScriptedEndpoint(*[answer(503)] * 11) as endpoint, feed(endpoint, time_scale=0.5) as one:
        one._stopped = Patient()
        assert one.deliver(body("Device.New")).attempts == 12
    assert RETRY_AFTER == (0, 10, 10, 20, 30, 50, 80, 120)
    assert waits == [0, 5, 5, 10, 15, 25, 40, 60, 30, 30, 30]


def test_feeds_do_not_wait_for_each_other() -> None:
    """Two feeds in two threads share a log. A feed that is blocked does not block the other."""
    stuck = Event()
    ledger = AttemptLog()
    with (
        ScriptedEndpoint(late(stuck)) as endpoint,
        feed(endpoint, name="slow", ledger=ledger) as slow,
        feed(endpoint, name="fast", ledger=ledger) as fast,
    ):
        running = Thread(target=slow.run, args=([body("Device.New")],))
        running.start()
        for _ in range(1000):
            if endpoint.received:
                break
            running.join(0.01)
        assert fast.run(body("Flowsheet.New", seed=seed) for seed in range(3))
        stuck.set()
        running.join(30)
    assert [attempt.feed for attempt in ledger.attempts] == ["fast", "fast", "fast", "slow"]
    assert len(ledger.accepted()) == 4


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            b'{"x":"AttemptID","Meta":{"Logs":[{"AttemptID":"a","ID":"b"}]},"AttemptID":"keep"}',
            b'{"x":"AttemptID","Meta":{"Logs":[{"AttemptID":"new","ID":"b"}]},"AttemptID":"keep"}',
        ),
        (
            b'{"Meta" : {"Logs":[{"AttemptID" : 12},{"AttemptID":null}]}}',
            b'{"Meta" : {"Logs":[{"AttemptID" : "new"},{"AttemptID":"new"}]}}',
        ),
        (b'{"Meta":{"Logs":[{"ID":"b"}]}}', b'{"Meta":{"Logs":[{"ID":"b"}]}}'),
        (b'{"Meta":{"AttemptID":"a"', b'{"Meta":{"AttemptID":"a"'),
        (b"\xff\xfe", b"\xff\xfe"),
        (b'{"Meta":{"AttemptID":"a"},"x":"\xff"}', b'{"Meta":{"AttemptID":"new"},"x":"\xff"}'),
    ],
)
def test_a_new_attempt_id_changes_meta_alone(before: bytes, after: bytes) -> None:
    """Only the attempt id changes; all other bytes stay the same."""
    assert with_attempt(before, "new") == after
