"""The rules of the group commit, each with the line that it guards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread

import psycopg
import pytest
from msgspec import structs
from sqlalchemy import text
from structlog.testing import capture_logs

from receiver.database.engine import normalise
from receiver.errors import Unavailable
from receiver.pipeline import Admitted, Receipt
from receiver.protocol.reading import read
from receiver.storage.accept import group_commit as writer_module
from receiver.storage.accept.batch import BatchWriter, Recorded
from receiver.storage.accept.group_commit import BATCH_ROWS, QUEUE_ROWS, GroupCommitWriter
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.accept.message_builder import MessageBuilder, PendingMessage
from receiver.storage.evidence.audit_log import AuditEvent
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.evidence.verify import verify
from tests.storage.door import Door, body, stalled, waiting
from tests.support.waiting import until


def outcomes(futures: list[Future[Receipt]]) -> list[str]:
    return [future.result(10).outcome for future in futures]


def proved(door: Door) -> None:
    """Everything written so far proves to be what was written."""
    with door.engine.connect() as connection:
        assert verify(connection, door.keyring, payloads=True).first_bad is None


def trigger(door: Door, table: str, when: str, does: str, *, each: str = "ROW") -> None:
    """Have the database do something at an INSERT into the table."""
    name = f"test_{table}_{when.lower()}"
    door.rows(f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {does}; RETURN NEW; END $$")
    door.rows(f"CREATE TRIGGER {name} {when} INSERT ON {table} FOR EACH {each} EXECUTE FUNCTION {name}()")


def by_key(door: Door, *logs: str) -> list[Admitted]:
    """The messages with these log ids, in the order of their keys."""
    return sorted((door.admit(body(log)) for log in logs), key=lambda each: stored_key(door, each))


def stored_key(door: Door, admitted: Admitted) -> tuple[bytes, bytes]:
    """(key, outside) of a message, as `message_keys` has them."""
    message, digests = read(admitted.inbound.body), KeyedDigests(door.keyring)
    return digests.message_key(message.key), digests.outside(message.outside)


# --- a batch


def test_what_waits_is_written_in_one_transaction_in_the_order_of_its_coming(door: Door, ledger: MessageLedger) -> None:
    """Messages and deliveries get their numbers in that order: it is the order in which a lane runs."""
    door.enable()
    with stalled(door, ledger):
        futures = [ledger.accept(door.admit(body(f"log-{n}"))) for n in range(10)]
    ids = [future.result(10).message_id for future in futures]
    assert ids == sorted(ids)
    rows = door.rows(
        "SELECT m.id, m.xmin, d.xmin AS d FROM messages m JOIN deliveries d ON d.message_id = m.id "
        "WHERE log_id NOT LIKE 'plug%' ORDER BY d.id"
    )
    assert [row.id for row in rows] == ids
    assert len({row.xmin for row in rows} | {row.d for row in rows}) == 1
    proved(door)


def test_a_batch_has_so_many_rows_and_bytes(door: Door, ledger: MessageLedger) -> None:
    """Beyond that, answers would wait for one another. Guards the two bounds in `Writer._take`."""
    small = [door.admit(body(f"log-{n}")) for n in range(BATCH_ROWS + 1)]
    with stalled(door, ledger):
        futures = [ledger.accept(each) for each in small]
    outcomes(futures)
    counts = door.rows("SELECT count(*) FROM messages WHERE log_id NOT LIKE 'plug%' GROUP BY xmin::text ORDER BY 1")
    assert [row[0] for row in counts] == [1, BATCH_ROWS]
    large = [door.admit(bytes([n]) * 6_000_000) for n in range(3)]
    with stalled(door, ledger):
        futures = [ledger.accept(each) for each in large]
    outcomes(futures)
    counts = door.rows("SELECT count(*) FROM messages WHERE state = 'quarantined' GROUP BY xmin::text ORDER BY 1")
    assert [row[0] for row in counts] == [1, 2]


# --- duplicates in the same batch, and in another one


def test_what_says_the_same_in_one_batch_is_written_once(door: Door, ledger: MessageLedger) -> None:
    """Each is answered and audited. Guards `fold`: one statement cannot claim a key twice."""
    door.enable()
    with stalled(door, ledger):
        futures = [ledger.accept(door.admit(body("twice"))) for _ in range(3)]
    assert outcomes(futures) == ["accepted", "duplicate", "duplicate"]
    assert len({future.result().message_id for future in futures}) == 1
    assert door.value("SELECT count(*) FROM messages WHERE log_id = 'twice'") == 1
    logged = door.rows(
        "SELECT outcome FROM audit_events WHERE message_uuid = :uuid ORDER BY n", uuid=futures[0].result().uuid
    )
    assert [row.outcome for row in logged] == ["accepted", "duplicate", "duplicate"]
    proved(door)


def test_what_says_the_same_in_one_batch_repeats_what_is_known(door: Door, ledger: MessageLedger) -> None:
    """All of them are duplicates of the message that was there before."""
    known = ledger.accept(door.admit(body("known"))).result(10)
    with stalled(door, ledger):
        futures = [ledger.accept(door.admit(body("known"))) for _ in range(3)]
        new = ledger.accept(door.admit(body("new")))
    assert outcomes([*futures, new]) == ["duplicate"] * 3 + ["unhandled"]
    assert {future.result().message_id for future in futures} == {known.message_id}
    assert door.value("SELECT count(*) FROM audit_events WHERE outcome = 'duplicate'") == 3
    proved(door)


@pytest.mark.parametrize("longer", [False, True])
def test_of_one_key_with_two_contents_in_a_batch_the_later_is_flagged(
    door: Door, ledger: MessageLedger, longer: bool
) -> None:
    """On both paths. Guards the flag in `fold`, and that a batch's own keys do not conflict on the duplicate path."""
    ledger.accept(door.admit(body("known"))).result(10)
    with stalled(door, ledger):
        futures = [ledger.accept(door.admit(body("same", outside=name))) for name in ("Ada", "Bea", "Cyd")]
        futures += [ledger.accept(door.admit(body("known")))] if longer else []
    assert outcomes(futures)[:3] == ["unhandled"] * 3
    flags = [
        door.value("SELECT id_conflict FROM messages WHERE id = :id", id=future.result().message_id)
        for future in futures[:3]
    ]
    assert flags == [False, True, True]


def test_ids_follow_the_order_of_coming_on_the_longer_way_too(door: Door, ledger: MessageLedger) -> None:
    """Keys are claimed in another order. Guards the materialised numbering in `CLAIM_KEYS`."""
    ledger.accept(door.admit(body("known"))).result(10)
    with stalled(door, ledger):
        futures = [ledger.accept(door.admit(body(log))) for log in ("known", *(f"log-{n}" for n in range(12)))]
    assert outcomes(futures) == ["duplicate"] + ["unhandled"] * 12
    ids = [future.result().message_id for future in futures[1:]]
    assert ids == sorted(ids)


def test_two_processes_that_get_the_same_message_at_once_write_it_once(
    door: Door, open_ledger: Callable[..., MessageLedger]
) -> None:
    """The second waits for the first's commit and finds its message. Guards the two statements of `_claim`.

    It is on the longer way already, by another repeat in its batch, when the first commits: in the snapshot of one
    statement it would see neither the key nor the message.
    """
    first, second = open_ledger(), open_ledger()
    known, contended = by_key(door, "a", "b")
    first.accept(known).result(10)
    second.accept(door.admit(body("warm"))).result(10)
    trigger(door, "message_keys", "AFTER", "PERFORM pg_advisory_xact_lock(1)", each="STATEMENT")
    with door.engine.connect() as gate:
        gate.execute(text("SELECT pg_advisory_lock(1)"))
        one = first.accept(contended)
        until(lambda: waiting(door) == 1, "the first to be about to commit")
        two = [second.accept(known), second.accept(contended)]
        until(lambda: waiting(door) == 2, "the second to wait for the first")
        gate.execute(text("SELECT pg_advisory_unlock(1)"))
    assert one.result(10).outcome == "unhandled"
    assert outcomes(two) == ["duplicate", "duplicate"]
    assert two[1].result().message_id == one.result().message_id
    proved(door)


def test_batches_in_opposite_orders_do_not_deadlock(door: Door, open_ledger: Callable[..., MessageLedger]) -> None:
    """Both take their keys in one order. Guards the ORDER BY of the keys in `RECORD`.

    Each is held back between its first key and its second: in the order of coming, each would then hold what the other
    wants.
    """
    ledgers = [open_ledger(), open_ledger()]
    pair = by_key(door, "a", "b")
    trigger(
        door,
        "message_keys",
        "BEFORE",
        """
        PERFORM set_config('test.n', (coalesce(nullif(current_setting('test.n', true), ''), '0')::int + 1)::text, true);
        IF current_setting('test.n') = '2' THEN PERFORM pg_advisory_xact_lock_shared(1); END IF""",
    )
    with door.engine.connect() as gate:
        gate.execute(text("SELECT pg_advisory_lock(1)"))
        with stalled(door, *ledgers):
            futures = [ledgers[n].accept(each) for n, order in enumerate((pair, pair[::-1])) for each in order]
        until(lambda: waiting(door) == 2, "both batches to wait")
        gate.execute(text("SELECT pg_advisory_unlock(1)"))
    assert sorted(outcomes(futures)) == ["duplicate", "duplicate", "unhandled", "unhandled"]
    for ledger in ledgers:
        ledger.stop()
    assert deadlocks(door) == 0
    proved(door)


def deadlocks(door: Door) -> int:
    """How many there were, once every session that could have met one has ended and told."""
    door.engine.dispose()
    until(lambda: door.value("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()") == 1, "an end")
    return int(door.value("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"))


# --- again


def test_a_deadlock_is_tried_again(door: Door, ledger: MessageLedger) -> None:
    """A real one, with somebody who takes keys in the other order. Guards 40P01 in `_RETRIABLE`."""
    first, last = by_key(door, "a", "b")
    keys = [stored_key(door, each) for each in (first, last)]
    destination = first.destination.id
    take = (
        "INSERT INTO message_keys (destination_id, key, outside, message_id, received_at) VALUES (%s, %s, %s, 0, now())"
    )
    url = normalise(door.engine.url.render_as_string(hide_password=False)).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False)) as other:
        other.execute("SET deadlock_timeout = '20s'")  # so that the ledger is the one who is sacrificed
        with stalled(door, ledger):
            futures = [ledger.accept(each) for each in (first, last)]
            other.execute(take, (destination, *keys[1]))
        until(lambda: waiting(door) == 1, "the batch to wait for the last key")
        other.execute(take, (destination, *keys[0]))  # waits until the ledger was sacrificed
        other.rollback()
    assert outcomes(futures) == ["unhandled", "unhandled"]
    ledger.stop()
    assert deadlocks(door) == 1
    proved(door)


@pytest.mark.parametrize("code", ["40001", "40P01"])
def test_what_the_server_asks_to_be_tried_again_is(door: Door, ledger: MessageLedger, code: str) -> None:
    """Twice it fails, then it is written, once. Guards `_RETRIABLE`."""
    door.rows("CREATE SEQUENCE tries")
    trigger(
        door, "message_keys", "BEFORE", f"IF nextval('tries') < 3 THEN RAISE EXCEPTION USING ERRCODE = '{code}'; END IF"
    )
    assert ledger.accept(door.admit(body())).result(10).outcome == "unhandled"
    assert door.value("SELECT count(*) FROM messages") == 1
    proved(door)


def test_what_never_succeeds_is_given_up(door: Door, ledger: MessageLedger) -> None:
    """Redox sends it again later. Guards `_ATTEMPTS`."""
    trigger(door, "message_keys", "BEFORE", "RAISE EXCEPTION USING ERRCODE = '40001'")
    with pytest.raises(Unavailable, match="conflicts"):
        ledger.accept(door.admit(body())).result(10)
    door.rows("DROP TRIGGER test_message_keys_before ON message_keys")
    assert ledger.accept(door.admit(body())).result(10).outcome == "unhandled"
    proved(door)


# --- one bad row

POISON = "IF NEW.facility = 'poison' THEN RAISE EXCEPTION 'no' USING ERRCODE = '22003'; END IF"


def test_a_row_that_the_database_refuses_hurts_itself_alone(door: Door, ledger: MessageLedger) -> None:
    """The others of its batch are accepted; it is kept too, without its columns. Guards `_write_apart` and `bare`."""
    door.enable()
    trigger(door, "messages", "BEFORE", POISON)
    content = body("bad", FacilityCode="poison")
    with stalled(door, ledger):
        futures = [ledger.accept(door.admit(each)) for each in (body("1"), content, body("1"), body("2"))]
    assert outcomes(futures) == ["accepted", "quarantined", "duplicate", "accepted"]
    row = door.rows("SELECT * FROM messages WHERE state = 'quarantined'")[0]
    assert (row.quarantine_reason, row.kind, row.facility, row.log_id, row.content_type, row.digest) == (
        "unstorable_columns",
        None,
        None,
        None,
        None,
        KeyedDigests(door.keyring).content(content),
    )
    assert door.value("SELECT count(*) FROM deliveries") == 3  # with the plug's
    proved(door)


def test_a_repeat_does_not_take_up_what_could_not_be_stored(door: Door, ledger: MessageLedger) -> None:
    """Its columns are still missing, whatever reason a release has found since. Guards the kind in `TAKE_UP`."""
    trigger(door, "messages", "BEFORE", POISON)
    content = body("bad", FacilityCode="poison")
    assert ledger.accept(door.admit(content)).result(10).outcome == "quarantined"
    door.rows("UPDATE messages SET quarantine_reason = 'source_unknown'")
    door.enable()
    assert ledger.accept(door.admit(content)).result(10).outcome == "duplicate"
    assert door.value("SELECT state FROM messages") == "quarantined"
    assert door.value("SELECT count(*) FROM deliveries") == 0


def test_a_row_that_cannot_be_a_text_is_kept_bare(door: Door, ledger: MessageLedger) -> None:
    """PostgreSQL refuses a NUL, in a batch and alone."""
    admitted = door.admit(body("bad"))
    assert admitted.message is not None
    with stalled(door, ledger):
        futures = [
            ledger.accept(door.admit(body("1"))),
            ledger.accept(structs.replace(admitted, message=structs.replace(admitted.message, facility="a\0b"))),
        ]
    assert outcomes(futures) == ["unhandled", "quarantined"]
    proved(door)


def test_a_row_that_no_code_foresaw_hurts_itself_alone(door: Door, ledger: MessageLedger) -> None:
    """Here a key whose message somebody deleted by hand. Guards the catch-all in `Recorder.record`."""
    ledger.accept(door.admit(body("bad"))).result(10)
    door.rows("DELETE FROM messages")
    with stalled(door, ledger):
        futures = [ledger.accept(door.admit(body(log))) for log in ("1", "bad", "2")]
    with pytest.raises(Unavailable, match="row_refused"):
        futures[1].result(10)
    assert outcomes([futures[0], futures[2]]) == ["unhandled", "unhandled"]


class Stumbling(BatchWriter):
    """A recorder that fails once as no recorder should."""

    stumbled = False

    def record(self, entries: Sequence[PendingMessage], events: Sequence[AuditEvent]) -> Recorded:
        if not self.stumbled:
            self.stumbled = True
            raise ZeroDivisionError
        return super().record(entries, events)


def test_the_writer_outlives_what_nobody_thought_of(door: Door) -> None:
    """An error in our code fails its batch, and the next one is written. Guards the catch-all in `Writer._run`."""
    seals = Sealer(door.keyring)
    entries = MessageBuilder(door.keyring, seals)
    writer = GroupCommitWriter(
        Stumbling(door.engine, door.keyring, seals, timeout=3),
        entries,
        quarantine_quota=1 << 20,
        on_commit=lambda _lanes: None,
    )
    writer.start()
    first, second = (entries.make(door.admit(body(log))) for log in "12")
    writer.put(first)
    with pytest.raises(Unavailable, match="ledger_failed"):
        first.future.result(10)
    writer.put(second)
    assert second.future.result(10).outcome == "unhandled"
    writer.stop()


def test_a_row_that_cannot_be_kept_at_all_is_told(door: Door, ledger: MessageLedger) -> None:
    """503, alone; so is an audit row that somebody waits for. A refusal that cannot be written is given up."""
    trigger(door, "messages", "BEFORE", "IF NEW.size > 1000 THEN RAISE EXCEPTION USING ERRCODE = '23514'; END IF")
    with stalled(door, ledger):
        began = time.monotonic()
        large, small = (ledger.accept(door.admit(body(log, outside="x" * n))) for log, n in (("1", 2000), ("2", 1)))
        bad, good = (
            ledger.record(AuditEvent(action="a.b", outcome="c", at=door.now, actor=actor)) for actor in ("a\0b", "ab")
        )
        ledger.refuse(door.refuse(b"", token="wrong", peer="\0"))
        until(lambda: time.monotonic() > began + 0.6, "the refusal to be due for the same batch")
    for future in (large, bad):
        with pytest.raises(Unavailable, match="row_refused"):
            future.result(10)
    assert small.result(10).outcome == "unhandled"
    good.result(10)
    assert door.value("SELECT count(*) FROM audit_events WHERE action = 'a.b'") == 1
    proved(door)


def test_a_row_that_takes_a_chains_number_stops_nothing(door: Door, ledger: MessageLedger) -> None:
    """A row that somebody inserted does not stop the feed. Verification finds and names it."""
    ledger.accept(door.admit(body("1"))).result(10)
    door.rows(
        "INSERT INTO audit_events (writer, n, at, action, outcome, actor, mac, mac_key) "
        "SELECT writer, n + 1, at, 'a.b', 'c', 'd', mac, mac_key FROM audit_events WHERE actor = 'redox'"
    )
    assert ledger.accept(door.admit(body("2"))).result(10).outcome == "unhandled"
    with door.engine.connect() as connection:
        found = verify(connection, door.keyring).first_bad
    assert found is not None
    assert "n 2, id" in found


# --- too much


def test_a_full_queue_says_so_at_once(door: Door, ledger: MessageLedger) -> None:
    """So many rows wait; what is beyond is told to come back, what waits is written. Guards `QUEUE_ROWS`."""
    admitted = door.admit(body("many"))
    with stalled(door, ledger):
        futures = [ledger.accept(admitted) for _ in range(QUEUE_ROWS)]
        with pytest.raises(Unavailable, match="queue_full"):
            ledger.accept(admitted).result(0)
    assert outcomes(futures) == ["unhandled"] + ["duplicate"] * (QUEUE_ROWS - 1)
    assert ledger.accept(admitted).result(10).outcome == "duplicate"


def test_refusals_that_cannot_be_written_are_bounded_and_counted(
    door: Door, ledger: MessageLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database takes none, so many wait as they are, the rest as numbers; nothing is lost in the end.

    Guards `EVENTS` and the room in `Flood.take`.
    """
    monkeypatch.setattr(writer_module, "EVENTS", 40)
    monkeypatch.setattr(writer_module, "_MAX_EVENTS_AT_ONCE", 10)  # in hand they leave room for as many more
    refused = [door.refuse(b"", token="wrong", peer=f"198.51.100.{n}") for n in range(100)]
    door.rows("ALTER TABLE audit_events RENAME TO elsewhere")
    with capture_logs() as logs:
        for n in range(1000):
            ledger.refuse(refused[n % 100])
        until(lambda: [each["event"] for each in logs].count("ledger.refused") >= 2, "the writer to have tried twice")
    door.rows("ALTER TABLE elsewhere RENAME TO audit_events")
    ledger.stop()
    logged = door.rows("SELECT count(*), sum(count) FROM audit_events WHERE action = 'message.refuse'")[0]
    assert logged[1] == 1000
    assert logged[0] <= 50 + 100
    proved(door)


def test_refusals_that_fail_while_it_stops_are_tried_again(door: Door, ledger: MessageLedger) -> None:
    """An attempt that began before the end and fails after it, as when a database restarts, loses nothing.

    Guards `_put_back` while stopping.
    """
    door.rows("CREATE SEQUENCE tries")
    trigger(
        door,
        "audit_events",
        "BEFORE",
        """
        PERFORM pg_advisory_xact_lock_shared(1);
        IF nextval('tries') = 1 THEN RAISE EXCEPTION USING ERRCODE = '57P01'; END IF""",
        each="STATEMENT",
    )
    stopping = Thread(target=ledger.stop)
    with door.engine.connect() as gate:
        gate.execute(text("SELECT pg_advisory_lock(1)"))
        ledger.refuse(door.refuse(b"", token="wrong", peer="198.51.100.1"))
        until(lambda: waiting(door) == 1, "the writer to be at it")
        stopping.start()
        until(lambda: ledger.accept(door.admit(body())).done(), "the end to begin: nothing is taken any more")
        gate.execute(text("SELECT pg_advisory_unlock(1)"))
    stopping.join(30)
    assert door.value("SELECT count(*) FROM audit_events WHERE action = 'message.refuse'") == 1
    proved(door)


def test_refusals_that_nobody_takes_end_with_the_process(
    door: Door, ledger: MessageLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the database takes none until the end, it ends all the same, and says how many are lost."""
    monkeypatch.setattr(writer_module, "COMMIT_TIMEOUT", 0.5)
    door.rows("ALTER TABLE audit_events RENAME TO elsewhere")
    for n in range(3):
        ledger.refuse(door.refuse(b"", token="wrong", peer=f"198.51.100.{n}"))
    with capture_logs() as logs:
        ledger.stop()
        until(lambda: any(each["event"] == "ledger.refusals_lost" for each in logs), "the refusals to be given up")
    assert [each["count"] for each in logs if each["event"] == "ledger.refusals_lost"] == [3]
    door.rows("ALTER TABLE elsewhere RENAME TO audit_events")


def test_a_queue_is_full_of_bytes_too(door: Door, open_ledger: Callable[..., MessageLedger]) -> None:
    """Six bodies of 40 MiB wait, a seventh does not, a small one does. Guards `QUEUE_BYTES`."""
    ledger = open_ledger(quarantine_quota=1 << 30)
    large, small = door.admit(b"x" * (40 << 20)), door.admit(body("small"))
    with stalled(door, ledger):
        futures = [ledger.accept(large) for _ in range(6)]
        with pytest.raises(Unavailable, match="queue_full"):
            ledger.accept(large).result(0)
        futures.append(ledger.accept(small))
    assert outcomes(futures) == ["quarantined"] + ["duplicate"] * 5 + ["unhandled"]
    assert ledger.accept(large).result(20).outcome == "duplicate"  # the queue's bytes are counted down again
