"""Delivery workers: real processes that are killed, frozen, stopped and started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from receiver.database.embedded.cluster import Cluster
from receiver.database.engine import open_engine
from receiver.storage.registry.changes import RegistryChanges
from receiver.worker import discovery
from tests.support.processes import gone
from tests.support.waiting import until
from tests.worker.plugins.scripted import PATIENT
from tests.worker.world import PLUGIN, ROOT, Sent, World, handler_processes

# A worker that is told to stop gives handlers half a minute.
STOPPED_WITHIN = 50.0


@pytest.fixture(scope="module")
def working(shared: World) -> Iterator[World]:
    """The module's world, with one worker that pauses a handler after three dead deliveries."""
    process = shared.start_worker(RECEIVER_CONCURRENCY="2", RECEIVER_PAUSE_AFTER_DEAD="3")
    yield shared
    stop(process)


def stop(process: subprocess.Popen[bytes]) -> int:
    """Stop a worker in order. Returns its exit status."""
    process.send_signal(signal.SIGTERM)
    return process.wait(STOPPED_WITHIN)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker, as a power failure does."""
    process.kill()
    process.wait(30)


def until_gone(pids: list[int]) -> None:
    until(lambda: all(gone(pid) for pid in pids), "no handler process is left")


# --- one worker


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

    [told] = working.rows(
        "SELECT actor, subject FROM audit_events WHERE action = 'handler.pause' AND destination = :place", place=place
    )
    assert told["actor"].startswith("worker:")
    assert sent.deliveries()[4]["attempts"] == 0
    working.execute("DELETE FROM deliveries WHERE id = :id", id=sent.deliveries()[4]["id"])
    working.registration.resume_handler("fragile", datetime.now(UTC), destination=place)
    until(lambda: sent.states()[-1] == "succeeded", "it goes on")


def test_enabled_while_it_runs(working: World, place: str) -> None:
    """A newly enabled handler runs without a restart. After it is disabled, pending deliveries stay."""
    working.enable("by-patient", place)
    sent = working.hand("nothing", destination=place)
    sent.until_states("succeeded")

    before = working.hand("raise", "nothing", destination=place)
    until(before.attempts, "it has failed once")
    working.registration.disable_handler(place, "by-patient", datetime.now(UTC))
    working.let_time_pass()
    after = working.hand("nothing", destination=place)
    assert after.states() == []
    assert before.states() == ["pending", "pending"]


def test_patients_are_indexed(working: World, place: str) -> None:
    """The patient identifiers of every message are digested, handled or not; an unreadable message counts as
    indexed.
    """
    sent = working.hand("nothing", destination=place, patient="4711")
    [message] = [each.message_id for each in sent.receipts]
    until(lambda: working.rows("SELECT FROM patient_digests WHERE message_id = :id", id=message), "it is indexed")

    until(lambda: not working.rows("SELECT FROM messages WHERE patients_indexed_at IS NULL"), "all are indexed")


def test_heartbeat(working: World) -> None:
    """A worker records its host, its handlers, and that it is alive."""
    [row] = until(lambda: working.rows("SELECT * FROM workers"), "it has said so")
    assert row["pid"] == working.processes[0].pid
    assert {"scripted", "within", "by-patient"} <= set(row["handlers"])
    assert "search" not in row["handlers"]  # responders run in the receiver


def test_no_patient_data_in_the_log(working: World, place: str) -> None:
    """A patient's name that a handler prints, logs or raises is in no line of the worker's log."""
    working.enable("fragile", place)
    sent = working.hand("print", "log", "raise", "nothing", destination=place)
    sent.until_done()

    log = working.log_path.read_text()
    assert '"event": "bed.assigned"' in log
    assert PATIENT.lower() not in log.lower()


# --- at its start and its end


def problems(world: World) -> list[dict[str, Any]]:
    """Return the reported problems of handlers."""
    return world.rows(
        "SELECT handler, destination, kind, error_class, place, detail FROM handler_problems ORDER BY handler, kind"
    )


@pytest.mark.parametrize(
    ("source", "detail", "error_class", "place"),
    [
        ("import no_such_library\n", "ModuleNotFoundError", "ModuleNotFoundError", "fresh:1"),
        ("import os; os._exit(3)\n", "its import ended the process with exit status 3", "Exit3", None),
    ],
)
def test_a_plugin_that_cannot_be_imported(
    world: World, source: str, detail: str, error_class: str, place: str | None
) -> None:
    """The other handlers run. The failure is reported, in the log and in the database, until the import succeeds."""
    (world.directory / "fresh.py").write_text(source)
    world.enable("scripted")
    sent = world.hand("nothing")
    process = world.start_worker(RECEIVER_HANDLERS=f"fresh,{PLUGIN}", PYTHONPATH=f"{world.directory}:{ROOT}")
    sent.until_states("succeeded")

    [problem] = until(lambda: problems(world), "it is reported")
    assert problem["detail"].startswith(f"module fresh of RECEIVER_HANDLERS cannot be imported: {detail}")
    assert (problem["kind"], problem["error_class"], problem["place"]) == ("plugin_not_loaded", error_class, place)
    assert '"event": "handler.not_loaded"' in world.log_path.read_text()
    (world.directory / "fresh.py").write_text(
        "from receiver.handlers import handler\n@handler('*', name='fresh')\ndef fresh(m, c): ...\n"
    )
    world.enable("fragile")  # a change of the registry makes the worker try again
    until(lambda: not problems(world), "it is over")
    assert stop(process) == 0


def test_two_responders_for_one_query(world: World) -> None:
    """Two responders for one query at one destination are reported, and the worker continues."""
    world.enable("search")
    world.enable("scripted")
    world.execute("""
        INSERT INTO subscriptions (destination_id, handler, role, patterns, ordering, acknowledge, on_failure,
                                   max_attempts, timeout, mac, mac_key)
        SELECT destination_id, 'rival', role, '{Notes.Query}', ordering, acknowledge, on_failure, max_attempts, timeout,
               mac, mac_key FROM subscriptions WHERE handler = 'search'""")
    _sign(world)
    sent = world.hand("nothing")
    process = world.start_worker(RECEIVER_HANDLERS="tests.worker.plugins.scripted,tests.worker.plugins.rival")
    sent.until_states("succeeded")
    until(
        lambda: any(
            "PatientSearch.Query is answered by both search and rival at lab" in each["detail"]
            for each in problems(world)
        ),
        "it is reported",
    )
    assert stop(process) == 0


def test_two_responders_in_development(world: World) -> None:
    """A module of RECEIVER_HANDLERS whose responder would be the second one of a development destination is
    reported.
    """
    world.add_destination("dev", environment="development")
    world.enable("search", "dev")
    process = world.start_worker(RECEIVER_HANDLERS="tests.worker.plugins.rival")
    [problem] = until(lambda: problems(world), "it is reported")
    assert (problem["handler"], problem["destination"], problem["detail"]) == (
        "rival",
        "dev",
        (
            "rival (module tests.worker.plugins.rival of RECEIVER_HANDLERS): PatientSearch.Query is answered by search "
            "at dev: a query has one responder"
        ),
    )
    assert stop(process) == 0
    assert problems(world) == []


def test_a_plugin_broken_under_a_live_worker(world: World) -> None:
    """A loaded handler that the handler processes cannot import is reported until they can."""
    code = "from receiver.handlers import handler\n@handler('*', name='fresh')\ndef fresh(m, c): ...\n"
    (world.directory / "fresh.py").write_text(code)
    world.registration.enable_handler(
        "lab", replace(discovery.load_handler("scripted", [PLUGIN]).spec, handler="fresh"), datetime.now(UTC)
    )
    process = world.start_worker(RECEIVER_HANDLERS="fresh", PYTHONPATH=f"{world.directory}:{ROOT}")
    until(lambda: world.rows("SELECT FROM workers WHERE 'fresh' = ANY(handlers)"), "it is loaded")
    (world.directory / "fresh.py").write_text("raise RuntimeError('half an upgrade, canary')\n")
    sent = world.hand("nothing")

    [problem] = until(lambda: problems(world), "it is reported")
    assert (problem["handler"], problem["kind"], problem["error_class"], problem["place"]) == (
        "fresh",
        "handler_not_started",
        "RuntimeError",
        "fresh:1",
    )
    assert "canary" not in problem["detail"] + world.log_path.read_text()
    (world.directory / "fresh.py").write_text(code)
    sent.until_states("succeeded")
    until(lambda: not problems(world), "it is over")
    assert stop(process) == 0


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


def _sign(world: World) -> None:
    """Sign the subscriptions that SQL inserted."""
    registration = RegistryChanges(world.engine, world.keyring, actor="tester@test")
    from receiver.storage import schema

    with world.engine.begin() as connection:
        for row in connection.execute(text("SELECT id FROM subscriptions")).all():
            registration._sign(connection, schema.subscriptions, row.id)


def test_development_bindings(world: World) -> None:
    """The handlers of RECEIVER_HANDLERS are bound to development destinations only, and not again after they were
    disabled.
    """
    world.add_destination("dev", environment="development")
    world.enable("fragile", "dev")
    world.registration.disable_handler("dev", "fragile", datetime.now(UTC))
    process = world.start_worker()
    query = (
        "SELECT d.name, s.handler, s.enabled FROM subscriptions s JOIN destinations d ON d.id = s.destination_id "
        "ORDER BY s.handler"
    )
    until(
        lambda: {"scripted", "search", "within"} <= {row["handler"] for row in world.rows(query) if row["enabled"]},
        "they are bound",
    )

    bound = {row["handler"]: row["enabled"] for row in world.rows(query)}
    assert bound["fragile"] is False
    assert {row["name"] for row in world.rows(query)} == {"dev"}
    sent = world.hand("nothing", destination="dev")
    until(lambda: "succeeded" in sent.states(), "they run")
    assert stop(process) == 0


def test_declarations_are_refreshed(world: World) -> None:
    """A worker updates the declaration in the registry to the handler's current one."""
    world.enable("scripted")
    world.execute("UPDATE subscriptions SET max_attempts = 99, timeout = 1")
    _sign(world)
    process = world.start_worker()
    until(lambda: world.rows("SELECT FROM subscriptions WHERE max_attempts = 2 AND timeout = 3"), "it is written down")
    assert world.rows("SELECT actor FROM audit_events WHERE action = 'handler.enable' AND actor LIKE 'worker:%'")
    assert stop(process) == 0


def test_a_handler_that_is_not_loaded(world: World) -> None:
    """A delivery whose handler no worker has loaded stays pending until a worker has."""
    world.enable("scripted")
    sent = world.hand("nothing", "nothing")
    process = world.start_worker(RECEIVER_HANDLERS="tests.worker.plugins.plain")
    until(lambda: world.rows("SELECT FROM workers"), "the worker works")
    until(lambda: '"event": "handler.not_installed", "handler": "scripted"' in world.log_path.read_text(), "it is told")
    assert [(each["state"], each["attempts"]) for each in sent.deliveries()] == [("pending", 0)] * 2
    assert stop(process) == 0

    process = world.start_worker()
    sent.until_states("succeeded", "succeeded")
    assert stop(process) == 0


def test_stopped_in_order(world: World) -> None:
    """A worker that is asked to stop lets the current handler end, starts no other, and releases its lanes."""
    world.enable("patient-one")
    flag = world.flag("go")
    sent = world.hand(f"wait_for:{flag}", "nothing")
    process = world.start_worker()
    begun = sent.until_begun()
    process.send_signal(signal.SIGTERM)
    until(lambda: "worker.stopping" in world.log_path.read_text(), "it stops")
    flag.touch()

    assert process.wait(STOPPED_WITHIN) == 0
    assert sent.states() == ["succeeded", "pending"]
    assert gone(begun["pid"])
    assert world.rows("SELECT owner FROM lanes") == [{"owner": None}]
    assert world.rows("SELECT FROM workers") == []


def test_stopped_at_once(world: World) -> None:
    """At the second signal a worker kills its handler.

    The attempt does not count, and the next worker runs it at once.
    """
    world.enable("patient-one")
    sent = world.hand("sleep", "nothing")
    process = world.start_worker()
    begun = sent.until_begun()
    process.send_signal(signal.SIGTERM)
    until(lambda: "worker.stopping" in world.log_path.read_text(), "it stops")
    process.send_signal(signal.SIGTERM)

    assert process.wait(STOPPED_WITHIN) == 0
    until_gone([begun["pid"]])
    assert [(each["state"], each["attempts"]) for each in sent.deliveries()] == [("pending", 0), ("pending", 0)]
    assert [(each["outcome"], each["error_class"]) for each in sent.attempts()] == [("crashed", "WorkerStopped")]
    assert world.rows("SELECT owner, state FROM lanes") == [{"owner": None, "state": "ready"}]


# --- killed and frozen


def test_killed_inside_a_handler(world: World) -> None:
    """After a worker is killed inside a handler, the lane continues in order within a minute.

    The lost attempt counts, and its work in our database is there once.
    """
    world.execute("CREATE TABLE effects (n integer, attempt integer)")
    world.enable("patient-one")
    flag = world.flag("go")
    sent = world.hand("insert", f"insert_wait:{flag}", "insert")
    first = world.start_worker()
    sent.until_begun(2)
    until(lambda: sent.journal("inserted"), "its work is done, not committed")
    left = [each.pid for each in handler_processes(first.pid)]
    kill(first)
    until_gone(left)

    second = world.start_worker()
    flag.touch()
    sent.until_states("succeeded", "succeeded", "succeeded", seconds=60)
    assert sent.ran() == [1, 2, 2, 3]
    assert [(row["n"] - sent.first, row["attempt"]) for row in world.rows("SELECT * FROM effects ORDER BY n")] == [
        (0, 1),
        (1, 2),
        (2, 1),
    ]
    assert [(each["outcome"], each["error_class"]) for each in sent.attempts()] == [
        ("succeeded", None),
        ("crashed", "WorkerLost"),
        ("succeeded", None),
        ("succeeded", None),
    ]
    assert len({line["key"] for line in sent.journal() if line["n"] == sent.numbers[1]}) == 1
    assert stop(second) == 0


@pytest.mark.parametrize("deed", ["insert_wait", "wait_for"])
def test_killed_between_the_end_and_the_record(world: World, deed: str) -> None:
    """If the worker is killed after a handler's end and before its record, the handler runs again: its work in our
    database is there once, and other systems see the same idempotency key.
    """
    world.execute("CREATE TABLE effects (n integer, attempt integer)")
    world.enable("patient-one")
    flag = world.flag("go")
    sent = world.hand(f"{deed}:{flag}", "nothing")
    first = world.start_worker()
    sent.until_begun()
    with world.engine.connect() as lock:
        lock.execute(text("SELECT FROM lanes FOR UPDATE"))  # what records an outcome waits for it
        flag.touch()
        [backend] = until(
            lambda: world.rows(
                "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%held AS%' "
                "AND datname = current_database()"
            ),
            "the end is about to be recorded",
        )
        assert len(sent.journal("end")) == 1
        kill(first)
        lock.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": backend["pid"]})
        until(lambda: not world.rows("SELECT FROM pg_stat_activity WHERE pid = :pid", pid=backend["pid"]), "it is cut")

    second = world.start_worker()
    sent.until_states("succeeded", "succeeded")
    assert sent.ran() == [1, 1, 2]
    assert len({line["key"] for line in sent.journal() if line["n"] == sent.first}) == 1
    assert world.rows("SELECT attempt FROM effects") == ([{"attempt": 2}] if deed == "insert_wait" else [])
    assert stop(second) == 0


def test_frozen_and_back(world: World) -> None:
    """A frozen worker loses its lanes to another, and its handler process ends with the lease.

    When it resumes, it records nothing and works on.
    """
    world.enable("patient-one")
    flag = world.flag("go")
    sent = world.hand(f"wait_for:{flag}", "nothing")
    frozen = world.start_worker()
    begun = sent.until_begun()
    os.kill(frozen.pid, signal.SIGSTOP)
    try:
        other = world.start_worker()
        until_gone([begun["pid"]])
        again = sent.until_begun(times=2)
        flag.touch()
        sent.until_states("succeeded", "succeeded")
    finally:
        os.kill(frozen.pid, signal.SIGCONT)

    assert again["epoch"] > begun["epoch"]
    assert again["pid"] not in [each.pid for each in handler_processes(frozen.pid)]
    more = world.hand(*["nothing"] * 5)
    more.until_done()
    assert [(each["delivery_id"], each["outcome"]) for each in sent.attempts()] == [
        (sent.deliveries()[0]["id"], "crashed"),
        (sent.deliveries()[0]["id"], "succeeded"),
        (sent.deliveries()[1]["id"], "succeeded"),
    ]
    assert (stop(frozen), stop(other)) == (0, 0)


def test_a_frozen_host(world: World) -> None:
    """A frozen host that resumes after its lanes were taken over records neither the success of its handler nor its
    work.
    """
    world.execute("CREATE TABLE effects (n integer, attempt integer)")
    world.enable("patient-one")
    flag = world.flag("go")
    sent = world.hand(f"insert_wait:{flag}", "nothing")
    frozen = world.start_worker()
    begun = sent.until_begun()
    until(lambda: sent.journal("inserted"), "its work is done, not committed")
    for pid in (frozen.pid, begun["pid"]):
        os.kill(pid, signal.SIGSTOP)
    other = world.start_worker()
    again = sent.until_begun(times=2)
    flag.touch()
    sent.until_states("succeeded", "succeeded")
    for pid in (begun["pid"], frozen.pid):
        os.kill(pid, signal.SIGCONT)
    until_gone([begun["pid"]])

    assert again["epoch"] > begun["epoch"]
    assert world.rows("SELECT attempt FROM effects") == [{"attempt": 2}]
    assert [each["outcome"] for each in sent.attempts()] == ["crashed", "succeeded", "succeeded"]
    assert (stop(frozen), stop(other)) == (0, 0)


def test_two_workers_one_killed(world: World) -> None:
    """Two workers share the lanes.

    When one is killed, every lane continues in order, and work in our database is done once.
    """
    world.execute("CREATE TABLE effects (n integer, attempt integer)")
    world.enable("scripted")
    lanes = [world.hand(*["insert"] * 60, source=f"s{number}") for number in range(6)]
    workers = [world.start_worker(RECEIVER_CONCURRENCY="2") for _ in range(2)]
    until(
        lambda: (
            len(world.rows("SELECT DISTINCT worker FROM delivery_attempts")) == 2 or "pending" not in world.states()
        ),
        "both have worked",
    )
    kill(workers[0])
    world.until_done()

    for sent in lanes:
        assert sent.states() == ["succeeded"] * 60
        assert sorted(set(sent.ran())) == list(dict.fromkeys(sent.ran())) == list(range(1, 61))
    assert len(world.rows("SELECT FROM effects")) == len(world.rows("SELECT DISTINCT n FROM effects")) == 360
    assert stop(workers[1]) == 0


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


def test_postgresql_is_away(world: World, tmp_path: Path) -> None:
    """A worker keeps running while PostgreSQL is down.

    Soon after it is back the lanes run, including those that it held.
    """
    directory = Path(os.path.realpath(world.directory)) / "data"
    with Cluster(directory).joined() as url:
        away = _copy_of(world, url)
        away.enable("patient-one")
        flag = away.flag("go")
        held = away.hand(f"wait_for:{flag}", "nothing")
        process = away.start_worker()
        held.until_begun()
        cluster = Cluster(directory)
        os.kill(cluster.pid() or 0, signal.SIGQUIT)  # at once, as in a crash
        until(lambda: not cluster.running(), "it is down")
        flag.touch()
        until(lambda: "worker.database_error" in away.log_path.read_text(), "the worker has noticed")
        cluster.start()
        away.engine.dispose()
        held.until_states("succeeded", "succeeded", seconds=60)
        new = away.hand("nothing", source="s2")
        new.until_done(seconds=30)
        assert process.poll() is None
        assert stop(process) == 0
        away.engine.dispose()
        world.processes.extend(away.processes)


def _copy_of(world: World, url: str) -> World:
    from receiver.database import migrations
    from receiver.storage.registry.key_records import record_keys

    engine = open_engine(url)
    migrations.upgrade(engine)
    with engine.begin() as connection:
        record_keys(connection, world.keyring)
    made = World(
        url=url,
        engine=engine,
        keyring=world.keyring,
        keyring_path=world.keyring_path,
        count=world.count,
        registration=RegistryChanges(engine, world.keyring, actor="tester@test"),
        directory=world.directory,
    )
    made.add_destination()
    return made
