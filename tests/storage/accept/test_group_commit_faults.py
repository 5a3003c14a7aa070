"""The group commit when the database, or the way to it, or the process itself fails: 503 within five seconds, never a
200 for what is not on disk, and well again by itself."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from sqlalchemy import Engine, text

from receiver.database import migrations
from receiver.database.embedded.cluster import Cluster
from receiver.database.engine import open_engine
from receiver.errors import Unavailable
from receiver.keyring import Keyring
from receiver.pipeline import Receipt
from receiver.storage.accept.group_commit import _WATCH_INTERVAL, COMMIT_TIMEOUT
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence.audit_log import AuditEvent
from receiver.storage.evidence.verify import verify
from receiver.storage.queue.partitions import PAYLOADS
from tests.storage.accept.test_group_commit import trigger
from tests.storage.door import Door, body, handler, stalled, waiting
from tests.support.postgres import QUICK, open_directory
from tests.support.tcp_proxy import TcpProxy, connect_to, tcp_proxy
from tests.support.waiting import until

CONNECTIONS = 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A server of our own, that nobody else is hurt with."""
    directory = open_directory()
    cluster = Cluster(directory, options=QUICK | {"max_connections": str(CONNECTIONS), "deadlock_timeout": "1s"})
    migrations.upgrade(open_engine(cluster.start(), pooled=False))
    yield cluster
    cluster.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def engine(cluster: Cluster) -> Iterator[Engine]:
    """The own server's database, emptied."""
    cluster.start()
    engine = open_engine(cluster.url, pooled=False)
    yield engine
    cluster.start()
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))  # the triggers of the partitions too
        connection.execute(
            text(
                "TRUNCATE messages, message_keys, payloads, deliveries, audit_events, destinations, "
                "credentials, sources, subscriptions"
            )
        )
        for row in connection.execute(
            text("SELECT tgrelid::regclass::text, tgname FROM pg_trigger WHERE tgname LIKE 'test%'")
        ).all():
            connection.execute(text(f"DROP TRIGGER {row[1]} ON {row[0]}"))
            connection.execute(text(f"DROP FUNCTION {row[1]}"))


def fails(future: Future[Any]) -> str:
    """The word with which it fails. Redox is promised an answer within five seconds; a busy machine may take longer."""
    assert COMMIT_TIMEOUT + _WATCH_INTERVAL < 5
    with pytest.raises(Unavailable) as caught:
        future.result(10)
    return str(caught.value)


def well_again(door: Door, ledger: MessageLedger) -> None:
    """The ledger records again by itself."""
    content = secrets.token_hex(8)

    def recorded() -> bool:
        return ledger.accept(door.admit(body(content))).exception(10) is None

    until(recorded, "well again")


def proved(door: Door) -> None:
    """Everything written proves to be what was written, and nothing is half written."""
    with door.engine.connect() as connection:
        assert verify(connection, door.keyring, payloads=True).first_bad is None
    counts = door.rows(
        "SELECT count(*), (SELECT count(*) FROM payloads), (SELECT count(*) FROM message_keys), "
        "(SELECT count(*) FROM audit_events WHERE action = 'message.receive' AND outcome <> 'duplicate') FROM messages"
    )
    assert len(set(counts[0])) == 1


def frozen(cluster: Cluster) -> list[psutil.Process]:
    """Every process of the server, the postmaster first."""
    postmaster = psutil.Process(cluster.pid())
    return [postmaster, *postmaster.children(recursive=True)]


# --- frozen


def test_a_frozen_server_is_answered_for_within_five_seconds(
    cluster: Cluster, door: Door, ledger: MessageLedger
) -> None:
    """It fires no time-out and closes no socket. What waits and what comes is told; then well again by itself.

    Guards `Recorder.cut` and the watchdog: without them nobody is answered before the server goes on.
    """
    ledger.accept(door.admit(body("before"))).result(10)
    admitted = [door.admit(body(f"log-{n}")) for n in range(20)]
    processes = frozen(cluster)
    for process in processes:
        process.suspend()
    try:
        futures: list[Future[Any]] = [ledger.accept(each) for each in admitted[:10]]
        futures.append(ledger.record(AuditEvent(action="a.b", outcome="c", at=door.now, actor="d")))
        assert {fails(future) for future in futures} <= {"timed_out", "database_away"}
        # The writer is free again, and what comes now is told as well: its new connection is answered by nobody.
        futures = [ledger.accept(each) for each in admitted[10:]]
        assert {fails(future) for future in futures} <= {"timed_out", "database_away"}
    finally:
        for process in reversed(processes):
            process.resume()
    well_again(door, ledger)
    # Redox repeats what it got a 503 for. What the server had already taken is known, the rest is new.
    repeats = [ledger.accept(each).result(10).outcome for each in admitted]
    assert set(repeats) <= {"unhandled", "duplicate"}
    assert door.value("SELECT count(*) FROM messages WHERE log_id LIKE 'log-%'") == 20
    proved(door)


def test_a_server_that_freezes_before_the_first_connection(cluster: Cluster, door: Door, ledger: MessageLedger) -> None:
    """The way to it is open and nobody greets: given up as well."""
    admitted = door.admit(body())
    processes = frozen(cluster)
    for process in processes:
        process.suspend()
    try:
        assert fails(ledger.accept(admitted)) in ("timed_out", "database_away")
    finally:
        for process in reversed(processes):
            process.resume()
    well_again(door, ledger)


def test_stopping_while_the_server_is_frozen_comes_to_an_end(
    cluster: Cluster, door: Door, ledger: MessageLedger
) -> None:
    """Waiting requests fail, and the process ends in time."""
    admitted, refused = door.admit(body()), door.refuse(b"", token="wrong")
    ledger.accept(door.admit(body("before"))).result(10)
    processes = frozen(cluster)
    for process in processes:
        process.suspend()
    try:
        future = ledger.accept(admitted)
        ledger.refuse(refused)
        ledger.stop()
        assert fails(future) in ("timed_out", "database_away")
    finally:
        for process in reversed(processes):
            process.resume()


# --- a lock that somebody holds


def test_a_lock_that_somebody_holds_is_the_servers_to_give_up(door: Door, ledger: MessageLedger) -> None:
    """503 within five seconds, and no session of ours is left behind that waits on and commits some day.

    Guards the statement's time-out in `dedicated`: a session that waits for a lock does not notice a cut socket.
    """
    ledger.accept(door.admit(body("before"))).result(10)
    with door.engine.connect() as connection:
        connection.execute(text("LOCK TABLE payloads"))
        for n in range(2):
            assert fails(ledger.accept(door.admit(body(f"log-{n}")))) in ("database_refuses", "timed_out")
        until(lambda: not waiting(door), "the sessions to give up")
    well_again(door, ledger)
    assert door.value("SELECT count(*) FROM messages WHERE log_id LIKE 'log-%'") == 0
    proved(door)


# --- away


@pytest.mark.parametrize("order", [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL])
def test_a_server_that_is_away_is_told_and_comes_back(
    cluster: Cluster, door: Door, ledger: MessageLedger, order: signal.Signals
) -> None:
    """Stopped, stopped hard, killed: fails at once, keeps the refusals, and is well again when the server is."""
    ledger.accept(door.admit(body("before"))).result(10)
    admitted, unreadable = door.admit(body("during")), door.admit(b"unreadable")
    refused = door.refuse(b"", token="wrong")
    processes = frozen(cluster)
    processes[0].send_signal(order)
    psutil.wait_procs(processes if order == signal.SIGKILL else processes[:1], 30)
    for _ in range(3):
        assert fails(ledger.accept(admitted)) == "database_away"
    ledger.refuse(refused)
    assert fails(ledger.record(AuditEvent(action="a.b", outcome="c", at=door.now, actor="d"))) == "database_away"
    assert fails(ledger.accept(unreadable)) == "database_away"  # and not that quarantine is full
    cluster.start()
    well_again(door, ledger)
    until(lambda: door.value("SELECT count(*) FROM audit_events WHERE action = 'message.refuse'") == 1, "the refusal")
    assert ledger.accept(admitted).result(10).outcome == "unhandled"
    proved(door)


def test_stopping_while_the_server_is_away_loses_no_answer(cluster: Cluster, door: Door, ledger: MessageLedger) -> None:
    """Everybody who waits is told; the end does not wait for the server to come back."""
    admitted, refused = door.admit(body()), door.refuse(b"", token="wrong")
    cluster.stop()
    futures = [ledger.accept(admitted) for _ in range(100)]
    ledger.refuse(refused)
    ledger.stop()
    assert {fails(future) for future in futures} == {"database_away"}


# --- refusing


def test_a_server_that_only_reads_is_told_and_comes_back(cluster: Cluster, door: Door, ledger: MessageLedger) -> None:
    """As after a failover to a standby. The connection is not kept: the address may lead elsewhere by then."""
    ledger.accept(door.admit(body("before"))).result(10)
    session = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%INSERT INTO messages%' AND pid <> pg_backend_pid()"
    first = door.value(session)
    with read_only(cluster):
        until(lambda: ledger.accept(door.admit(body("during"))).exception(10), "read-only")
        assert fails(ledger.accept(door.admit(body("during")))) == "database_refuses"
    well_again(door, ledger)
    assert door.value(session) != first
    proved(door)


@contextmanager
def read_only(cluster: Cluster) -> Iterator[None]:
    with psycopg.connect(cluster.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        connection.execute("SELECT pg_reload_conf()")
        yield
        connection.execute("SET transaction_read_only = off")
        connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
        connection.execute("SELECT pg_reload_conf()")


@pytest.mark.parametrize("code", ["53100", "53200", "53400", "55P03", "57014", "58030", "XX000"])
def test_what_the_server_refuses_for_its_own_sake_is_no_bad_row(door: Door, ledger: MessageLedger, code: str) -> None:
    """Out of disk, of memory, a lock, cancelled, a broken disk: the whole batch is told, nothing is quarantined."""
    trigger(door, "payloads", "BEFORE", f"RAISE EXCEPTION USING ERRCODE = '{code}'")
    with stalled_failing(door, ledger):
        futures = [ledger.accept(door.admit(body(f"log-{n}"))) for n in range(3)]
    assert {fails(future) for future in futures} == {"database_refuses"}
    assert door.value("SELECT count(*) FROM messages") == 0
    door.rows("DROP TRIGGER test_payloads_before ON payloads")
    door.rows("DROP FUNCTION test_payloads_before")
    well_again(door, ledger)
    proved(door)


@contextmanager
def stalled_failing(door: Door, ledger: MessageLedger) -> Iterator[None]:
    """As `stalled`, where the plug too must fail."""
    with pytest.raises(Unavailable), stalled(door, ledger):
        yield


@pytest.fixture
def tiny_disk() -> Iterator[Path]:
    """A file system of 4 MiB that the server's account may write to."""
    directory = Path(tempfile.mkdtemp(prefix="redox-receiver-tests-"))
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m,mode=1777", "tmpfs", directory], check=False
        ).returncode
        == 0
    )
    try:
        if not mounted:
            pytest.skip("only root may mount a small disk; 53100 is tried by hand above")
        yield directory
    finally:
        if mounted:
            subprocess.run(["umount", "-l", directory], check=True)
        directory.rmdir()


def test_a_full_disk_is_told_and_well_again_when_there_is_room(
    cluster: Cluster, door: Door, ledger: MessageLedger, tiny_disk: Path
) -> None:
    """A real one: every 200 is there, nothing is half written, and more room is all that is needed."""
    place = tiny_disk / "space"
    place.mkdir(mode=0o700)
    owner = cluster.directory.stat()
    os.chown(place, owner.st_uid, owner.st_gid)
    partition = PAYLOADS.partition(PAYLOADS.start(door.now))
    with psycopg.connect(cluster.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE TABLESPACE tiny LOCATION '{place}'")
        connection.execute(f"ALTER TABLE {partition} SET TABLESPACE tiny")
        accepted: list[Receipt] = []

        def full() -> bool:
            future = ledger.accept(door.admit(body(f"log-{len(accepted)}", outside=secrets.token_hex(100_000))))
            if future.exception(10) is None:
                accepted.append(future.result())
                return False
            return fails(future) == "database_refuses"

        until(full, "a full disk")
        assert door.value("SELECT count(*) FROM messages") == len(accepted)
        proved(door)
        subprocess.run(["mount", "-o", "remount,size=64m", tiny_disk], check=True)
        well_again(door, ledger)
        proved(door)
        connection.execute(f"ALTER TABLE {partition} SET TABLESPACE pg_default")
        connection.execute("DROP TABLESPACE tiny")


def test_a_server_without_a_free_connection_is_told_and_comes_back(
    cluster: Cluster, door: Door, ledger: MessageLedger
) -> None:
    """The ledger has none yet, and gets one as soon as there is one."""
    admitted = door.admit(body())
    with ExitStack() as stack:
        with pytest.raises(psycopg.OperationalError):  # noqa: PT012 - the last of many
            while True:
                stack.enter_context(psycopg.connect(cluster.url.replace("+psycopg", "")))
        assert fails(ledger.accept(admitted)) == "database_away"
    well_again(door, ledger)
    proved(door)


# --- the way to it


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[TcpProxy]:
    """A proxy in front of the server."""
    with tcp_proxy(partial(connect_to, cluster.url)) as made:
        yield made


@pytest.fixture
def proxied(proxy: TcpProxy, cluster: Cluster, door: Door) -> Iterator[MessageLedger]:
    """A ledger that reaches the server through the proxy."""
    ledger = MessageLedger(open_engine(proxy.url(cluster.url), pooled=False), door.keyring, quarantine_quota=1 << 20)
    ledger.start()
    yield ledger
    ledger.stop()


def test_an_answer_that_is_lost_after_the_commit_makes_the_repeat_a_duplicate(
    proxy: TcpProxy, door: Door, proxied: MessageLedger
) -> None:
    """503, though it is there: Redox sends it again, and it is not written twice. The chains still hold.

    Guards the new chain after a lost connection: nobody knows how far the old one was written.
    """
    door.enable(handler())
    proxied.accept(door.admit(body("before"))).result(10)
    proxy.drop_answers = True
    lost = proxied.accept(door.admit(body("lost")))
    until(lambda: door.value("SELECT count(*) FROM messages WHERE log_id = 'lost'"), "the commit")
    proxy.cut()
    assert fails(lost) == "database_away"
    proxy.drop_answers = False
    repeat: list[Receipt] = []

    def again() -> bool:
        future = proxied.accept(door.admit(body("lost")))
        repeat.extend([future.result()] if future.exception(10) is None else [])
        return bool(repeat)

    until(again, "well again")
    assert repeat[0].outcome == "duplicate"
    assert door.value("SELECT count(*) FROM deliveries") == 2
    assert proxied.accept(door.admit(body("after"))).result(10).outcome == "accepted"
    assert door.value("SELECT count(DISTINCT writer) FROM audit_events WHERE action = 'message.receive'") == 2
    proved(door)


def test_a_session_that_is_ended_by_an_operator_is_replaced(door: Door, ledger: MessageLedger) -> None:
    """pg_terminate_backend in the middle of a batch: told, nothing half written, then another session."""
    trigger(door, "message_keys", "AFTER", "PERFORM pg_advisory_xact_lock(1)", each="STATEMENT")
    with door.engine.connect() as gate:
        gate.execute(text("SELECT pg_advisory_lock(1)"))
        future = ledger.accept(door.admit(body("lost")))
        until(lambda: waiting(door) == 1, "the batch to wait")
        door.rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        assert fails(future) == "database_away"
    assert door.value("SELECT count(*) FROM messages") == 0
    assert ledger.accept(door.admit(body("lost"))).result(10).outcome == "unhandled"
    proved(door)


def test_a_network_that_drops_everything_after_the_greeting(
    proxy: TcpProxy, door: Door, proxied: MessageLedger
) -> None:
    """The first questions on a new connection are the driver's, not ours; waiting for them is ended as well.

    Guards that `BatchWriter._keep_socket` is the first of the listeners: else nobody has the socket that has to be cut.
    """
    proxy.drop_after_greeting = True
    assert fails(proxied.accept(door.admit(body("1")))) in ("timed_out", "database_away")
    proxy.drop_after_greeting = False
    well_again(door, proxied)
    proved(door)


# --- the process itself

SENDER = """
import sys
from pathlib import Path
from tests.storage.door import Door, body
from receiver import keyring as keyrings
from receiver.database.engine import open_engine
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.registry.changes import RegistryChanges
engine, keyring = open_engine(sys.argv[1]), keyrings.load_keyring(Path(sys.argv[2]))
door = Door(engine, keyring, RegistryChanges(engine, keyring, actor="child"))
ledger = MessageLedger(engine, keyring, quarantine_quota=1 << 30)
ledger.start()
contents = [door.admit(body(f"log-{n}")) for n in range(50)]
print("ready", flush=True)
for future in [ledger.accept(each) for each in contents]:
    future.result()
print("done", flush=True)
"""


@pytest.mark.parametrize("longer", [False, True])
def test_a_process_that_is_killed_in_a_batch_leaves_all_of_it_or_nothing(
    door: Door, ledger: MessageLedger, keyring: Keyring, tmp_path: Path, longer: bool
) -> None:
    """SIGKILL between the rows and the commit; on the longer way the commit is never sent. Others go on."""
    keyring.save(tmp_path / "keyring.json")
    if longer:
        ledger.accept(door.admit(body("log-0"))).result(10)
    before = door.value("SELECT count(*) FROM messages")
    trigger(door, "audit_events", "AFTER", "PERFORM pg_advisory_xact_lock(1)", each="STATEMENT")
    with door.engine.connect() as gate:
        gate.execute(text("SELECT pg_advisory_lock(1)"))
        with subprocess.Popen(
            [sys.executable, "-c", SENDER, door.engine.url.render_as_string(), tmp_path / "keyring.json"],
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            until(lambda: waiting(door) == 1, "the batch to wait")
            child.kill()
    until(lambda: not waiting(door), "the session to end")
    until(lambda: door.value("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'") <= 3, "end")
    if longer:
        assert door.value("SELECT count(*) FROM messages") == before
    proved(door)
    well_again(door, ledger)
