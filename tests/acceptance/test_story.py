"""The whole system, from outside: two hosts are killed at the worst moments, and no message is lost.

Two hosts reach one PostgreSQL over TCP and share no directory. The sender's attempt log decides.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from receiver.samples import sample
from receiver.simulator.simulation import Simulation, SimulationPlan
from tests.faults.load import name_of
from tests.faults.site import Installation, receiver_workers, site
from tests.support.processes import gone
from tests.support.waiting import until


@pytest.fixture(scope="module")
def running() -> Iterator[Installation]:
    """A receiver and a worker on one host, a worker alone on another, and two destinations."""
    with site() as made:
        made.first.up("--workers", "1")
        made.second.work()
        for destination in ("lab", "ward"):
            made.open(destination)
        yield made


def test_all_that_redox_sends(running: Installation) -> None:
    """Feeds send every kind, duplicates, queries, and requests that must be refused. Each is answered correctly,
    recorded, delivered in order, and verified."""
    runs = {
        "lab": Simulation(
            running.target("lab"),
            SimulationPlan(kinds=sample.kinds(), feeds=6, seed=1, misbehave=True, time_scale=0.02),
        ),
        "ward": Simulation(
            running.target("ward"),
            SimulationPlan(
                kinds=[kind for kind in sample.kinds() if kind.startswith(("PatientAdmin.", "FHIR.", "Inventory."))],
                feeds=3,
                seed=1,
                count=2,
                time_scale=0.02,
            ),
        ),
    }
    with ThreadPoolExecutor(2) as threads:
        results = {name: threads.submit(run.run) for name, run in runs.items()}
    for name, run in runs.items():
        assert [result for result in results[name].result() if result.wrong] == []
        assert len(results[name].result()) == run.total
        running.note(name, run.ledger)
    # Deliveries behind a failing first one wait for an operator.
    until(lambda: not running.rows("SELECT FROM deliveries WHERE state = 'pending' AND handler <> 'strict' LIMIT 1"))
    assert running.violations() == []

    kept = {row["state"]: row["n"] for row in running.rows("SELECT state, count(*) AS n FROM messages GROUP BY 1")}
    assert kept["accepted"] >= 200
    assert kept["quarantined"] >= 10
    outcomes = {row["outcome"] for row in running.rows("SELECT DISTINCT outcome FROM delivery_attempts")}
    assert outcomes == {"succeeded", "failed", "crashed", "retry_later", "gave_up"}
    refused = {row["reason"] for row in running.rows("SELECT reason FROM audit_events WHERE outcome = 'refused'")}
    assert {"token_wrong", "bearer_differs", "credential_missing", "destination_unknown"} < refused
    # Only one handler's failures are dead, and only one handler's lanes are held.
    assert {row["handler"] for row in running.rows("SELECT handler FROM deliveries WHERE state = 'dead'")} == {"shaky"}
    assert {row["handler"] for row in running.rows("SELECT handler FROM deliveries WHERE state = 'pending'")} == {
        "strict"
    }


def test_a_worker_is_killed_inside_a_handler(running: Installation) -> None:
    """The interrupted delivery is rolled back and runs on the other host. Later ones of its lane wait, others do not.
    No process of the killed worker is left."""
    redox = running.target("lab").redox()
    bodies = [redox.body("PatientAdmin.Transfer", seed=2_000 + number) for number in range(4)]
    gate = running.gate("book", name_of(bodies[1]))
    with running.feed("lab", "killed") as feed:
        assert feed.run(bodies)

    def inside() -> list[dict[str, int]]:
        return [
            line for line in running.journal() if line["phase"] == "inside" and line["message"] == name_of(bodies[1])
        ]

    until(inside)
    process, worker = (psutil.Process(inside()[-1][which]) for which in ("pid", "worker"))
    worker.kill()
    until(lambda: gone(process))
    gate.unlink()
    if worker.pid in [each.pid for each in running.second.workers]:  # nothing else restarts it
        running.second.workers[-1].wait(30)
        running.second.work()
    assert running.violations() == []
    tried = running.rows(
        "SELECT a.outcome FROM delivery_attempts a JOIN deliveries d ON d.id = a.delivery_id "
        "JOIN messages m ON m.id = d.message_id WHERE d.handler = 'book' AND m.log_id = :log ORDER BY a.id",
        log=name_of(bodies[1]),
    )
    assert [row["outcome"] for row in tried] == ["crashed", "succeeded"]


def test_a_receiver_is_killed_between_commit_and_answer(running: Installation) -> None:
    """A message that was committed but not answered is sent again, and found to be a duplicate. It is handled once, and
    the feed continues."""
    redox = running.target("ward").redox()
    first, second = (redox.body("PatientAdmin.Arrival", seed=seed) for seed in (3_000, 3_001))
    held = running.first.proxy.hold_answer(name_of(first).encode())
    with running.feed("ward", "unanswered") as feed, ThreadPoolExecutor(1) as threads:
        sending = threads.submit(feed.run, [first, second])
        assert held.committed.wait(60)
        there = running.rows("SELECT uuid, state FROM messages WHERE log_id = :log", log=name_of(first))
        assert [row["state"] for row in there] == ["accepted"]
        assert running.sent["ward"].of(name_of(first)) == ()
        (receiver,) = receiver_workers(running.first)
        os.kill(receiver, signal.SIGKILL)
        held.release()
        assert sending.result(120)
    lost, repeated = running.sent["ward"].of(name_of(first))
    assert (lost.status, repeated.status) == (None, 200)
    rows = running.rows(
        "SELECT outcome FROM audit_events WHERE message_uuid = :uuid AND action = 'message.receive' ORDER BY id",
        uuid=there[0]["uuid"],
    )
    assert [row["outcome"] for row in rows] == ["accepted", "duplicate"]
    assert running.violations() == []


def test_a_replay(running: Installation) -> None:
    """A replayed message is delivered again under another idempotency key, and the handler can see that."""
    body = running.target("lab").redox().body("PatientAdmin.Discharge", seed=4_000)
    with running.feed("lab", "replayed") as feed:
        assert feed.run([body])
    assert running.violations() == []
    (message,) = running.rows("SELECT id, uuid::text FROM messages WHERE log_id = :log", log=name_of(body))
    printed = running.first.json("messages", "replay", str(message["id"]), "--handler", "outside", "--reason", "a test")
    assert printed["made"] == 1
    assert running.violations() == []
    done = [
        line
        for line in running.journal()
        if line["message"] == name_of(body) and line["phase"] == "done" and line["handler"] == "outside"
    ]
    assert [(line["key"], line["replayed"]) for line in done] == [
        (f"{message['uuid']}:outside:1", False),
        (f"{message['uuid']}:outside:2", True),
    ]
    assert running.second.json("audit", "verify", "--payloads")["first_bad"] is None
