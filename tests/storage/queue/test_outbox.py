"""The rows of the outbox: which lanes are due, and what is held."""

from __future__ import annotations

import re
from collections.abc import Iterator
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, Engine, text

from receiver.handlers.declaration import _NAME
from receiver.storage.queue import outbox, wake_ups
from receiver.storage.queue.outbox import NewRequest

LANE = "@outbox/lab/destination-1"


def new(lane: str | None = LANE) -> NewRequest:
    return NewRequest(
        uuid=uuid4(),
        api_key="lab",
        lane=lane,
        call="send",
        kind="Notes.New",
        message_uuid=None,
        destination=None,
        created_by="tester@test",
        request_key="k",
        request=b"sealed",
    )


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as opened:
        yield opened.execution_options(isolation_level="AUTOCOMMIT")


@pytest.mark.parametrize(
    ("to", "lane"),
    [
        ("2b1f6f2c-0000-4000-8000-000000000002", "@outbox/lab/2b1f6f2c-0000-4000-8000-000000000002"),
        ("our-ehr/Production", "@outbox/lab/our-ehr/Production"),
        *((odd, r"@outbox/lab/[0-9a-f]{32}") for odd in ("Ada Byron", "x" * 81, "a\0b", "\ud800", "größe", "a\nb")),
    ],
)
def test_a_lane_names_no_one(to: str, lane: str) -> None:
    """A lane's name contains ids and slugs unchanged, and a digest of anything else."""
    assert re.fullmatch(lane, outbox.lane("lab", to))


def test_no_handler_has_such_lanes() -> None:
    """No handler can have the queue's name."""
    assert not _NAME.fullmatch(outbox.QUEUE)


def test_due(connection: Connection) -> None:
    """A lane with a request that may be sent now is due until it has a job. A direct call is not due."""
    assert outbox.due(connection) == []
    outbox.put(connection, new(None))
    assert outbox.due(connection) == []
    for lane in (LANE, "@outbox/lab/another", LANE):
        outbox.put(connection, new(lane))
    assert outbox.due(connection) == ["@outbox/lab/another", LANE]
    wake_ups.defer(connection, LANE)
    assert outbox.due(connection) == ["@outbox/lab/another"]
    connection.execute(text("UPDATE outbound_requests SET ready_at = now() + interval '1 hour'"))
    assert outbox.due(connection) == []


def test_what_waits_behind_one_that_pauses_waits_too(connection: Connection) -> None:
    """Only the first request of a lane decides whether it is due."""
    first = outbox.put(connection, new())
    outbox.put(connection, new())
    connection.execute(
        text("UPDATE outbound_requests SET ready_at = now() + interval '1 hour' WHERE id = :id"), {"id": first}
    )

    assert outbox.due(connection) == []
    assert outbox.claim(connection, LANE, "w", 60) is None


def test_hold(connection: Connection) -> None:
    """Pending requests are held and not due; sent and dead ones are unchanged."""
    for state in ("pending", "sent", "dead"):
        number = outbox.put(connection, new())
        connection.execute(
            text("UPDATE outbound_requests SET state = :state WHERE id = :id"), {"state": state, "id": number}
        )

    assert outbox.hold(connection) == 1
    assert outbox.hold(connection) == 0
    assert outbox.due(connection) == []
    assert list(connection.scalars(text("SELECT state FROM outbound_requests ORDER BY id"))) == ["held", "sent", "dead"]


def test_a_stuck_lane_does_not_slow_the_others(connection: Connection) -> None:
    """The scan goes from lane to lane: 100,000 requests in a lane that waits are not read."""
    connection.execute(
        text(
            "INSERT INTO outbound_requests (uuid, api_key, lane, call, kind, created_by, state, ready_at) "
            "SELECT gen_random_uuid(), 'lab', '@outbox/lab/stuck', 'send', 'Notes.New', 't', 'pending', "
            "now() + interval '1 hour' FROM generate_series(1, 100000)"
        )
    )
    outbox.put(connection, new())
    connection.execute(text("ANALYZE outbound_requests"))
    assert outbox.due(connection) == [LANE]
    plan = "\n".join(connection.exec_driver_sql(f"EXPLAIN (ANALYZE, TIMING OFF) {outbox._DUE}").scalars())

    assert "Seq Scan on outbound_requests" not in plan
    rows = [int(float(number)) for number in re.findall(r"outbound_requests.*actual rows=([\d.]+)", plan)]
    assert max(rows) <= 1


def test_an_answer_is_there_once_it_was_sent(connection: Connection) -> None:
    """There is no answer to a request that does not exist, waits, or was refused."""
    waiting = new()
    outbox.put(connection, waiting)

    assert outbox.answer(connection, waiting.uuid) is None
    assert outbox.answer(connection, UUID(int=0)) is None
