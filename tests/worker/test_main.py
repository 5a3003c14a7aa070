"""Workers that are stopped, killed and frozen, and a database that is down."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from sqlalchemy import text

from receiver.database.embedded.cluster import Cluster
from receiver.database.engine import open_engine
from receiver.storage.registry.changes import RegistryChanges
from tests.support.processes import gone
from tests.support.waiting import until
from tests.worker.worker_processes import STOP_TIMEOUT, kill, stop, until_gone
from tests.worker.world import World, handler_processes


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

    assert process.wait(STOP_TIMEOUT) == 0
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

    assert process.wait(STOP_TIMEOUT) == 0
    until_gone([begun["pid"]])
    assert [(each["state"], each["attempts"]) for each in sent.deliveries()] == [("pending", 0), ("pending", 0)]
    assert [(each["outcome"], each["error_class"]) for each in sent.attempts()] == [("crashed", "WorkerStopped")]
    assert world.rows("SELECT owner, state FROM lanes") == [{"owner": None, "state": "ready"}]


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
