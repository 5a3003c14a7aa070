"""A simulation sends what its plan says, as Redox does, and reports every incorrect response."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import pairwise
from threading import Event, Thread
from typing import Any

import pytest

from receiver.simulator.attacks import AttackTarget, attack_cases
from receiver.simulator.simulation import DUPLICATE_EVERY, LOSE_EVERY, SimulatedResult, Simulation, SimulationPlan
from tests.simulator.model_receiver import JSON, TEXT, Answer, Spoil, answered, model_receiver

NOTIFICATIONS = ("PatientAdmin.Arrival", "Scheduling.New", "FHIR.PatientAdminCreated")
QUERY = "PatientSearch.Query"
PLAN = SimulationPlan(kinds=(*NOTIFICATIONS, QUERY), seed=7)


def run(
    spoil: Spoil = lambda _body, _count, right: right, plan: SimulationPlan = PLAN, **policies: Any
) -> list[SimulatedResult]:
    """What becomes of a plan at a receiver with that flaw."""
    with model_receiver(spoil, **policies) as target:
        return Simulation(target, plan).run()


def outcomes(results: list[SimulatedResult]) -> Counter[str]:
    """How many there are of each outcome."""
    return Counter(result.outcome for result in results)


def messages_only(flawed: Answer) -> Spoil:
    """A receiver that is right about handshakes and gives every message that answer."""
    return lambda body, _count, right: flawed if b'"Meta"' in body or b"Bundle" in body else right


def test_a_correct_receiver() -> None:
    """Both handshakes, every notification and every query have a result, and none is wrong."""
    results = run()
    assert outcomes(results) == {"handshake": 2, "accepted": 3, "no responder": 1}
    assert {result.wrong for result in results} == {None}
    assert {result.what for result in results if result.outcome == "accepted"} == set(NOTIFICATIONS)


def test_total() -> None:
    """`total` is the number of results: messages, duplicates, queries, handshakes and attacks."""
    plan = dataclasses.replace(PLAN, count=2 * DUPLICATE_EVERY, misbehave=True)
    with model_receiver() as target:
        simulation = Simulation(target, plan)
        seen: list[SimulatedResult] = []
        results = simulation.run(seen.append)
    assert len(results) == simulation.total
    assert seen == results
    assert outcomes(results)["accepted again"] == 3 * 2
    assert outcomes(results)["misbehaviour met"] == len(attack_cases())
    assert {result.wrong for result in results} == {None}


def test_lost_responses() -> None:
    """With misbehavior, some responses are lost. Redox sends again, and the receiver recognizes the duplicates."""
    plan = SimulationPlan(kinds=("PatientAdmin.Arrival",), count=2 * LOSE_EVERY, seed=7, misbehave=True)
    attempts = [result.attempts for result in run(plan=plan) if result.outcome == "accepted"]
    assert attempts == [1, 1, 2, 1, 1, 2]


def test_each_feed_is_in_order_and_a_data_model_in_one() -> None:
    """A feed sends a message after the previous one was answered. All messages of a Data Model are in one feed."""
    plan = SimulationPlan(kinds=("PatientAdmin.Arrival", "PatientAdmin.Discharge", "Scheduling.New"), count=4, seed=7)
    with model_receiver() as target:
        simulation = Simulation(target, plan)
        simulation.run()
    attempts = simulation.ledger.attempts
    feeds = {attempt.feed: [each for each in attempts if each.feed == attempt.feed] for attempt in attempts}
    assert len(feeds) == 2
    for sent in feeds.values():
        assert len({str(each.kind).partition(".")[0] for each in sent}) == 1
        assert all(one.answered_at is not None and one.answered_at <= next_.sent_at for one, next_ in pairwise(sent))


def test_the_same_seed_sends_the_same_and_another_does_not() -> None:
    """Two runs with one seed send the same messages, so the second run is all duplicates. Another seed sends others."""

    def sent(seed: int) -> set[str]:
        with model_receiver() as target:
            simulation = Simulation(target, dataclasses.replace(PLAN, seed=seed))
            simulation.run()
        return {attempt.message for attempt in simulation.ledger.attempts}

    assert sent(7) == sent(7)
    assert not sent(7) & sent(8)


def test_a_failed_handshake_ends_it() -> None:
    """When the handshake does not pass, nothing else is sent."""
    results = run(lambda _body, _count, _right: (401, TEXT, b""))
    assert [(result.outcome, result.wrong) for result in results] == [("wrong", "responded 401, expected 200")] * 2


def test_a_handshake_of_the_new_form_alone() -> None:
    """A challenge that is not the whole body would not have passed earlier, and is reported."""
    results = run(lambda body, _count, right: (200, JSON, b'{"challenge":"' + right[2] + b'"}') if right[2] else right)
    assert results[0].wrong == "responded 200, but the body is not the challenge as text/plain"


def test_a_feed_that_stops() -> None:
    """A notification that is never accepted stops its feed. The rest of it is counted, and other feeds go on."""

    def spoil(body: bytes, _count: int, right: Answer) -> Answer:
        return (403, TEXT, b"") if b'"PatientAdmin"' in body else right

    results = run(spoil, SimulationPlan(kinds=("PatientAdmin.Arrival", "Scheduling.New"), count=3, seed=7, timeout=0.0))
    assert [result.wrong for result in results if result.wrong] == [
        "responded 403, expected 200; feed-1 is paused with 2 more messages"
    ]
    assert outcomes(results)["accepted"] == 3


def test_a_receiver_that_recovers() -> None:
    """A message that is rejected first and accepted later is correct, with its attempts counted."""
    refused: Counter[bytes] = Counter()

    def spoil(body: bytes, _count: int, right: Answer) -> Answer:
        kind = body[:60]
        if b'"PatientAdmin"' in body and refused[kind] < 2:
            refused[kind] += 1
            return 503, TEXT, b""
        return right

    results = run(spoil, SimulationPlan(kinds=("PatientAdmin.Arrival",), seed=7, time_scale=0.0001))
    assert [(result.outcome, result.attempts, result.wrong) for result in results if result.what.startswith("Pat")] == [
        ("accepted", 3, None)
    ]


@pytest.mark.parametrize(
    ("flawed", "error"),
    [((204, TEXT, b""), "responded 204, expected 200"), ((302, TEXT, b""), "responded 302, expected 200")],
)
def test_accepted_otherwise_than_with_200(flawed: Answer, error: str) -> None:
    """A notification that is accepted with a status other than 200 is reported."""
    results = run(messages_only(flawed), SimulationPlan(kinds=("PatientAdmin.Arrival",), seed=7))
    assert [result.wrong for result in results if result.outcome == "wrong"] == [error]


@pytest.mark.parametrize(
    ("flawed", "error"),
    [
        (
            (200, JSON, b'{"Meta":{"DataModel":"PatientSearch","EventType":"Query"}}'),
            "responded 'PatientSearch.Query', expected PatientSearch.Response",
        ),
        ((200, JSON, b""), "responded 'None.None', expected PatientSearch.Response"),
        ((200, JSON, b'{"Meta":{"Errors":[{"Text":"no"}]}}'), "responded 200 with Meta.Errors"),
        ((500, JSON, b'{"Meta":{"Errors":[{"Text":"no"}]}}'), "responded 500, expected 200"),
        ((500, TEXT, b"oh"), "responded 500, expected 200, and without Meta.Errors"),
        ((501, TEXT, b""), "responded 501, expected 200, and without Meta.Errors"),
        ((200, JSON, b"[" * 5000), "responded 'None.None', expected PatientSearch.Response"),
        ((200, JSON, b'{"Meta":[]}'), "responded 'None.None', expected PatientSearch.Response"),
    ],
)
def test_invalid_answers(flawed: Answer, error: str) -> None:
    """An answer that is not the Response of the query's kind, or an error not in Redox's shape, is reported."""
    results = run(messages_only(flawed), SimulationPlan(kinds=(QUERY,), seed=7))
    assert [result.wrong for result in results if result.what == QUERY] == [error]


def test_answered_queries() -> None:
    """A query that is answered with its Response is correct, also for wire names with a space."""
    kinds = (QUERY, "ClinicalSummary.PatientQuery", "SSO.Sign-on")
    results = run(
        lambda body, _count, right: answered(body) if right[0] == 501 else right, SimulationPlan(kinds=kinds, seed=7)
    )
    assert outcomes(results) == {"handshake": 2, "answered": 3}


def test_bodies_as_they_are() -> None:
    """Given bodies are sent byte for byte: messages, queries, and bodies that are neither."""
    seen: list[bytes] = []

    def spoil(body: bytes, _count: int, right: Answer) -> Answer:
        seen.append(body)
        return right

    message = json.dumps(
        {"Meta": {"DataModel": "Device", "EventType": "New", "Source": {"ID": "7ce6f387-c33c-417d-8682-81e83628cbd9"}}},
        indent=3,
    ).encode()
    results = run(spoil, SimulationPlan(bodies=(message, b"no message"), seed=7))
    assert outcomes(results) == {"handshake": 2, "accepted": 2}
    assert {message, b"no message"} <= set(seen)


def test_meta_test() -> None:
    """`test` sets Meta.Test: a destination that rejects test messages accepts the message only without it."""
    plan = SimulationPlan(kinds=("PatientAdmin.Arrival",), seed=7, timeout=0.0)
    assert outcomes(run(plan=plan, test_messages="reject"))["wrong"] == 1
    assert outcomes(run(plan=dataclasses.replace(plan, test=False), test_messages="reject"))["accepted"] == 1


def test_rate() -> None:
    """Messages start at the given rate, over all feeds together."""
    with model_receiver() as target:
        simulation = Simulation(target, SimulationPlan(kinds=NOTIFICATIONS, count=2, seed=7, rate=50.0))
        simulation.run()
    sent = sorted(attempt.sent_at for attempt in simulation.ledger.attempts)
    assert sent[-1] - sent[0] >= 0.8 * (len(sent) - 1) / 50.0


def test_stopped_in_a_pause() -> None:
    """`stop` ends a run at once, even in one of Redox's pauses. Messages that were not sent have no result."""
    paused = Event()

    def spoil(body: bytes, _count: int, right: Answer) -> Answer:
        if b'"PatientAdmin"' in body:
            paused.set()
            return 503, TEXT, b""
        return right

    with model_receiver(spoil) as target:
        simulation = Simulation(
            target, SimulationPlan(kinds=("PatientAdmin.Arrival",), count=5, seed=7, timeout=3600.0)
        )
        results: list[SimulatedResult] = []
        thread = Thread(target=lambda: results.extend(simulation.run()))
        thread.start()
        assert paused.wait(30)
        simulation.stop()
        thread.join(30)
        assert not thread.is_alive()
    assert outcomes(results) == {"handshake": 2}


def test_connection_refused() -> None:
    """A refused connection is reported."""
    target = AttackTarget(base_url="http://127.0.0.1:9", destination="main", token="t" * 32, source_id="s")
    assert {result.wrong for result in Simulation(target, PLAN).run()} == {"no answer (ConnectionRefusedError)"}
