"""The lane worker: order, hung handlers, pauses, and the log of failed attempts."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from tests.support.processes import gone
from tests.support.waiting import until
from tests.worker.plugins.scripted import PATIENT
from tests.worker.worker_processes import stop
from tests.worker.world import Sent, World


def test_strict_order(working: World, place: str) -> None:
    """Each lane runs in order, whatever fails, and lanes do not wait for one another."""
    working.enable("scripted", place)
    one = working.hand("nothing", "raise:2", "nothing", "exit", "give_up", "nothing", destination=place, source="1")
    two = working.hand(*["nothing"] * 100, destination=place, source="2")
    two.until_done()
    one.until_done()

    assert one.states() == ["succeeded", "succeeded", "succeeded", "dead", "dead", "succeeded"]
    assert one.ran() == [1, 2, 2, 3, 4, 4, 5, 6]
    assert two.ran() == list(range(1, 101))


def test_a_hung_handler_blocks_only_its_lane(working: World, place: str) -> None:
    """While a handler hangs, another lane runs. The handler is killed at its timeout, and its lane continues."""
    working.enable("fragile", place)
    hung = working.hand("loop", "nothing", destination=place, source="1")
    begun = hung.until_begun()
    other = working.hand("nothing", "nothing", destination=place, source="2")
    other.until_states("succeeded", "succeeded")
    hung.until_states("dead", "succeeded")

    assert hung.outcomes() == ["timed_out", "succeeded"]
    assert gone(begun["pid"])


def test_many_dead_pause_the_handler(working: World, place: str) -> None:
    """After many dead deliveries of one error class, the handler is paused at that destination, with an audit row.

    The remaining deliveries stay pending until it is resumed.
    """
    working.enable("fragile", place)
    sent = working.hand("raise", "give_up", "raise", "raise", "raise", "nothing", destination=place)

    def paused() -> object:
        return working.rows(
            "SELECT s.pause_reason FROM subscriptions s JOIN destinations d ON d.id = destination_id "
            "WHERE d.name = :place AND paused_at IS NOT NULL",
            place=place,
        )

    assert until(paused, "it is paused") == [{"pause_reason": "many_dead:ValueError"}]
    sent.until_states("dead", "dead", "dead", "dead", "pending", "pending")

    [problem] = working.rows(
        "SELECT actor, subject FROM audit_events WHERE action = 'handler.pause' AND destination = :place", place=place
    )
    assert problem["actor"].startswith("worker:")
    assert sent.deliveries()[4]["attempts"] == 0
    working.execute("DELETE FROM deliveries WHERE id = :id", id=sent.deliveries()[4]["id"])
    working.registration.resume_handler("fragile", datetime.now(UTC), destination=place)
    until(lambda: sent.states()[-1] == "succeeded", "it goes on")


def test_no_patient_data_in_the_log(working: World, place: str) -> None:
    """A patient's name that a handler prints, logs or raises is in no line of the worker's log."""
    working.enable("fragile", place)
    sent = working.hand("print", "log", "raise", "nothing", destination=place)
    sent.until_done()

    log = working.log_path.read_text()
    assert '"event": "bed.assigned"' in log
    assert PATIENT.lower() not in log.lower()


def test_a_failing_handler_in_the_log(working: World, place: str) -> None:
    """Each failed attempt and each dead delivery is a log line with class, frames and SQLSTATE, without the error's
    text. A timeout has the frames where the handler hung. An error that the receiver wrote has its text.
    """
    working.enable("scripted", place)
    sent = working.hand("raise", "sql_error", "no_key", destination=place)

    def dead() -> bool:
        working.let_time_pass()
        return "pending" not in sent.states()

    until(dead, "they are dead")

    lines = [json.loads(line) for line in working.log_path.read_text().splitlines()]
    mine = [line for line in lines if line.get("logger") == "receiver.delivery" and line["destination"] == place]
    first = [line for line in mine if line["handler"] == "scripted" and line["error_class"] == "ValueError"]
    assert [line["event"] for line in first] == ["delivery.failed", "delivery.dead"]
    assert first[0]["frames"][-1].startswith("tests.worker.plugins.scripted:")
    assert {line["sqlstate"] for line in mine if line["error_class"] == "ProgrammingError"} == {"42P01"}
    assert all("has no API key" in line["error"] for line in mine if line["error_class"] == "ConfigurationError")
    assert PATIENT not in working.log_path.read_text()


def test_attempts_are_counted(working: World, place: str) -> None:
    """Each attempt by outcome, and the run time of those that succeed, in counters that processes share."""
    working.enable("scripted", place)
    sent = working.hand("nothing", "give_up", destination=place)
    sent.until_states("succeeded", "dead")

    def counted() -> dict[str, float]:
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(working.directory / "metrics"))  # type: ignore[no-untyped-call]
        return {
            sample.labels["outcome"]: sample.value
            for family in registry.collect()
            for sample in family.samples
            if sample.name == "redox_receiver_delivery_attempts_total" and sample.labels["destination"] == place
        }

    until(lambda: counted() == {"succeeded": 1, "dead": 1}, "both are counted")


def test_frames_of_a_timeout(working: World, place: str) -> None:
    """The frames of a timeout are the handler's, in Python code or in a library's call; reading them interrupts
    neither.
    """
    working.enable("brief", place)
    sent = working.hand("loop", "hold_interpreter", destination=place)
    sent.until_states("dead", "dead")
    for attempt, name in zip(sent.attempts(), ("_loop", "_hold_interpreter"), strict=True):
        assert attempt["outcome"] == "timed_out"
        assert [frame.split(":")[0] + ":" + frame.split(":")[2] for frame in attempt["error_frames"]] == [
            "tests.worker.plugins.scripted:brief",
            "tests.worker.plugins.scripted:act",
            f"tests.worker.plugins.scripted:{name}",
        ]


def test_a_backlog_in_a_stuck_lane(world: World) -> None:
    """100,000 pending deliveries in a lane that waits do not delay another lane."""
    world.enable("scripted")
    world.enable("unordered")
    stuck = world.hand("retry_later:3600", source="stuck")
    stuck_id = stuck.receipts[0].message_id
    world.execute(
        """
        INSERT INTO deliveries (message_id, received_at, destination_id, handler, lane, inline, generation, ready_at)
        SELECT message_id, received_at, destination_id, handler,
               CASE handler WHEN 'unordered' THEN 'unordered/lab/any:3' ELSE lane END, inline, g,
               CASE handler WHEN 'unordered' THEN now() + interval '1 hour' END
        FROM deliveries, generate_series(2, 100001) g WHERE message_id = :id""",
        id=stuck_id,
    )
    world.execute("UPDATE deliveries SET lane = 'unordered/lab/any:3' WHERE handler = 'unordered'")
    process = world.start_worker()
    until(lambda: world.rows("SELECT FROM delivery_attempts WHERE outcome = 'retry_later'"), "it is stuck")
    others: list[Sent] = []
    for number in range(5):
        others.append(world.hand("nothing", "nothing", source=f"free{number}"))
        others[-1].until_done(seconds=30)

    assert {state for sent in others for state in sent.states()} == {"succeeded"}
    assert len(stuck.states()) == 200_002
    assert not {"dead", "succeeded"} & set(stuck.states())
    assert stop(process) == 0
