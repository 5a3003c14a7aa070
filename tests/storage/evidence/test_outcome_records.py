"""Outcomes of deliveries in the audit: each attempt once, and what is changed afterwards is found."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest

from receiver.states import MessageState
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence import outcome_records
from receiver.storage.evidence.outcome_records import OutcomeRange, OutcomeRecorder
from receiver.storage.evidence.verify import verify
from tests.storage.door import Door, body, handler
from tests.storage.hand import Hand, arrive


@pytest.fixture
def recorder(door: Door) -> OutcomeRecorder:
    return OutcomeRecorder(door.engine, door.keyring, actor="worker:w")


@pytest.fixture
def ran(door: Door, ledger: MessageLedger, recorder: OutcomeRecorder) -> Door:
    """Three deliveries: two succeeded, one is dead, recorded in two audit rows; and a fourth that waits."""
    door.enable(handler())
    arrive(door, ledger, *(body(f"log-{n}") for n in range(4)))
    Hand(door.engine).take().succeed(1)
    assert recorder.record() == 1
    door.rows("UPDATE lanes SET owner = NULL, lease_until = NULL")
    Hand(door.engine).take().succeed(1)
    door.rows("UPDATE lanes SET owner = NULL, lease_until = NULL")
    Hand(door.engine).take().fail()
    assert recorder.record() == 2
    assert recorder.record() == 0
    ledger.stop()
    return door


def bad(door: Door) -> str | None:
    with door.engine.connect() as connection:
        return verify(connection, door.keyring).first_bad


def ranges(door: Door) -> list[OutcomeRange]:
    rows = door.rows("SELECT detail FROM audit_events WHERE action = 'delivery.outcomes' ORDER BY id")
    return [msgspec.json.decode(row.detail, type=OutcomeRange) for row in rows]


def test_each_attempt_is_recorded_once(ran: Door) -> None:
    """The ranges follow one another; each says how many attempts had which outcome."""
    first, second = ranges(ran)
    assert (first.after, first.attempts, first.outcomes) == (0, 1, {"succeeded": 1})
    assert (second.after, second.attempts, second.outcomes) == (first.up_to, 2, {"failed": 1, "succeeded": 1})
    assert bad(ran) is None


def test_another_host_goes_on(ran: Door) -> None:
    """It begins after what the audit says, whichever process wrote that; with nothing new it writes nothing."""
    assert OutcomeRecorder(ran.engine, ran.keyring, actor="worker:other").record() == 0
    assert len(ranges(ran)) == 2


def test_an_outcome_that_commits_late_is_not_left_out(ran: Door, recorder: OutcomeRecorder) -> None:
    """Its id was given before others that are recorded; nothing beyond it is recorded before it has ended."""
    add = (
        "INSERT INTO delivery_attempts (delivery_id, received_at, attempt, epoch, worker, started_at, outcome) "
        "SELECT id, received_at, 9, 1, 'w', now(), 'failed' FROM deliveries ORDER BY id LIMIT 1"
    )
    before = ran.value("SELECT count(*) FROM delivery_attempts")
    with ran.engine.begin() as late:
        late.exec_driver_sql(add)
        ran.rows(add)
        assert recorder.record() == 0
        assert recorder.record() == 0
    assert recorder.record() == 2
    assert ranges(ran)[-1].after == before
    assert bad(ran) is None


def test_more_than_one_row_holds(ran: Door, recorder: OutcomeRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is recorded next."""
    monkeypatch.setattr(outcome_records, "MOST", 2)
    monkeypatch.setattr(outcome_records, "_ATTEMPTS", outcome_records._ATTEMPTS.replace("LIMIT 5000", "LIMIT 2"))
    ran.rows(
        "INSERT INTO delivery_attempts (delivery_id, received_at, attempt, epoch, worker, started_at, outcome) "
        "SELECT id, received_at, 9, 1, 'w', :at, 'failed' FROM deliveries ORDER BY id LIMIT 3",
        at=datetime.now(UTC),
    )
    assert [recorder.record() for _ in range(3)] == [2, 1, 0]
    assert bad(ran) is None


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("UPDATE delivery_attempts SET outcome = 'succeeded' WHERE outcome = 'failed'", "delivery_attempts ids 2 to "),
        (
            "UPDATE delivery_attempts SET worker = 'other' WHERE id = 1",
            "delivery_attempts ids 1 to 1: a row was changed",
        ),
        ("DELETE FROM delivery_attempts WHERE id = 3", "delivery_attempts ids 2 to "),
        ("DELETE FROM delivery_attempts", "delivery_attempts ids 1 to 1: a row was changed"),
        (
            (
                "INSERT INTO delivery_attempts (id, delivery_id, received_at, attempt, epoch, worker, started_at, "
                "outcome) OVERRIDING SYSTEM VALUE "
                "SELECT 1, id, received_at + interval '1 second', 1, 1, 'w', now(), 'succeeded' "
                "FROM deliveries WHERE state = 'pending'"
            ),
            "delivery_attempts ids 1 to 1: a row was changed, deleted or inserted",
        ),
        ("UPDATE deliveries SET state = 'succeeded' WHERE state = 'pending'", "deliveries id 4: marked as succeeded"),
        ("UPDATE deliveries SET state = 'succeeded' WHERE state = 'dead'", "deliveries id 3: marked as succeeded"),
    ],
)
def test_what_was_not_run_is_found(ran: Door, statement: str, found: str) -> None:
    """Attack: a delivery is set to succeeded, and its attempts are changed, deleted or made up."""
    ran.rows(statement)
    failure = bad(ran)
    assert failure is not None
    assert failure.startswith(found)


@pytest.mark.parametrize("state", [MessageState.QUARANTINED, MessageState.ACCEPTED])
def test_a_delivery_of_a_message_in_quarantine_is_found(door: Door, ledger: MessageLedger, state: str) -> None:
    """Attack: a delivery is inserted, so that a handler runs what nobody released; also with the state changed."""
    door.enable(handler())
    (number,) = arrive(door, ledger, b"no json")
    ledger.stop()
    assert bad(door) is None
    door.rows("UPDATE messages SET state = :state", state=state)
    (row,) = door.rows(
        "INSERT INTO deliveries (message_id, received_at, destination_id, handler, lane, inline) "
        "SELECT id, received_at, destination_id, 'register', 'register/clinic/x', false FROM messages WHERE id = :id "
        "RETURNING id",
        id=number,
    )
    assert bad(door) == f"deliveries id {row.id}: its message is in quarantine, never released"
