"""Facts about what people ask of the requests to Redox, and have put right."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Engine, text

from receiver.errors import Conflict, IntegrityError, NotFound
from receiver.keyring import Keyring
from receiver.storage.operations import outbound_requests
from receiver.storage.operations.outbound_requests import OutboundRecords, RequestFilter
from tests.storage.door import Door

NOW = datetime(2026, 1, 31, 8, tzinfo=UTC)


@pytest.fixture
def verbs(engine: Engine, keyring: Keyring) -> OutboundRecords:
    return OutboundRecords(engine, keyring, actor="tester@test")


def fill(
    engine: Engine,
    count: int,
    *,
    state: str = "dead",
    lane: str | None = "@outbox/lab/d",
    error: str = "Rejected",
    request: bytes | None = b"sealed",
    key: str = "lab",
) -> None:
    """Rows as they might be; nothing in them opens."""
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO outbound_requests (uuid, api_key, lane, call, kind, created_by, state, error_class, attempts, "
                "unanswered, ready_at, request, request_key) SELECT gen_random_uuid(), :key, :lane, 'send', 'Notes.New', "
                "'t', :state, :error, 7, 3, now(), :request, 'payload-x' FROM generate_series(1, :count)"
            ),
            {"count": count, "state": state, "lane": lane, "error": error, "request": request, "key": key},
        )


def column(engine: Engine, name: str) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.scalars(text(f"SELECT {name} FROM outbound_requests ORDER BY id")))


def test_retry_in_batches(engine: Engine, verbs: OutboundRecords) -> None:
    """However many they are, each is retried, and each has its audit row."""
    fill(engine, 1_203)
    assert len(verbs.retry(RequestFilter(api_key="lab"), NOW, reason="why", dry_run=True).done) == 1_203
    assert set(column(engine, "state")) == {"dead"}
    done = verbs.retry(RequestFilter(api_key="lab"), NOW, reason="why")

    assert (len(done.done), done.left) == (1_203, {})
    assert set(zip(column(engine, "state"), column(engine, "attempts"), column(engine, "unanswered"), strict=True)) == {
        ("pending", 0, 0)
    }
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM audit_events WHERE action = 'outbound.retry'")) == 1_203


def test_by_filters_it_is_the_dead(engine: Engine, verbs: OutboundRecords) -> None:
    """What is held, or waits, is meant only when it is asked for by state or id."""
    for state in ("dead", "held", "pending", "sent"):
        fill(engine, 1, state=state)
    assert verbs.retry(RequestFilter(api_key="lab"), NOW, reason="why").done == (1,)
    assert verbs.retry(RequestFilter(state="held"), NOW, reason="why").done == (2,)
    assert verbs.retry(RequestFilter(ids=(3, 4)), NOW, reason="why").done == (3,)
    assert column(engine, "attempts") == [0, 0, 7, 7]
    assert column(engine, "state") == ["pending"] * 3 + ["sent"]


def test_what_is_left_is_told(engine: Engine, verbs: OutboundRecords) -> None:
    """A call made at once, what is purged, what is sent and what is not there stay, each with its reason."""
    fill(engine, 1, lane=None)
    fill(engine, 1, request=None)
    fill(engine, 1, state="sent")
    done = verbs.retry(RequestFilter(ids=(1, 2, 3, 4)), NOW, reason="why")

    assert done.done == ()
    assert [done.left[number].split()[1] for number in (1, 2, 3, 4)] == ["a", "purged:", "sent", "not"]
    assert column(engine, "state") == ["dead", "dead", "sent"]


def test_bodies(engine: Engine, verbs: OutboundRecords) -> None:
    """What is not there, is purged, or does not open is told; and nothing is said to have been disclosed."""
    fill(engine, 1, request=None)
    fill(engine, 1)
    with pytest.raises(NotFound, match="outbox list"):
        verbs.bodies(99, NOW, reason="why")
    with pytest.raises(Conflict, match="purged"):
        verbs.bodies(1, NOW, reason="why")
    with pytest.raises(IntegrityError):
        verbs.bodies(2, NOW, reason="why")
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM audit_events")) == 0


def test_troubles(engine: Engine) -> None:
    """By key, state and error: what is dead, held, or waits after a failure; not what waits its turn, nor calls that
    were made at once."""
    fill(engine, 2)
    fill(engine, 1, state="pending", error="AuthenticationFailed", key="other")
    fill(engine, 4, lane=None)
    fill(engine, 3, state="sent")
    with engine.begin() as connection:
        connection.execute(text("UPDATE outbound_requests SET error_class = NULL WHERE state = 'sent'"))
        connection.execute(text("UPDATE outbound_requests SET state = 'pending' WHERE state = 'sent'"))
        told = outbound_requests.problems(connection)

    assert [(each["api_key"], each["state"], each["error_class"], each["count"]) for each in told] == [
        ("lab", "dead", "Rejected", 2),
        ("other", "pending", "AuthenticationFailed", 1),
    ]


def test_waiting(engine: Engine, door: Door) -> None:
    """Deliveries of one destination and requests with some keys are counted together."""
    fill(engine, 2, state="pending")
    fill(engine, 1, state="pending", key="other")
    with engine.connect() as connection:
        assert outbound_requests.waiting(connection, "clinic", ["lab"]) == 2
        assert outbound_requests.waiting(connection, "clinic", ["lab", "other"]) == 3
    door.enable()
    door.rows(
        "INSERT INTO deliveries (message_id, destination_id, handler, lane, inline) "
        "SELECT 1, id, 'register', 'register/clinic/x', false FROM destinations"
    )
    with engine.connect() as connection:
        assert outbound_requests.waiting(connection, "clinic", ["lab"]) == 3
        assert outbound_requests.waiting(connection, "elsewhere", ["lab"]) == 2
