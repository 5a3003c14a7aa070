"""Queries about requests to Redox."""

from __future__ import annotations

from sqlalchemy import Engine, text

from receiver.storage.operations import outbound_requests
from tests.storage.door import Door
from tests.storage.operations.request_rows import add_requests


def test_problems(engine: Engine) -> None:
    """Problems are what is dead, held, or waits after a failure, by key, state and error; not what waits in turn, nor
    direct calls.
    """
    add_requests(engine, 2)
    add_requests(engine, 1, state="pending", error="AuthenticationFailed", key="other")
    add_requests(engine, 4, lane=None)
    add_requests(engine, 3, state="sent")
    with engine.begin() as connection:
        connection.execute(text("UPDATE outbound_requests SET error_class = NULL WHERE state = 'sent'"))
        connection.execute(text("UPDATE outbound_requests SET state = 'pending' WHERE state = 'sent'"))
        shown = outbound_requests.problems(connection)

    assert [(each["api_key"], each["state"], each["error_class"], each["count"]) for each in shown] == [
        ("lab", "dead", "Rejected", 2),
        ("other", "pending", "AuthenticationFailed", 1),
    ]


def test_waiting(engine: Engine, door: Door) -> None:
    """Waiting deliveries of a destination and requests with these keys are counted together."""
    add_requests(engine, 2, state="pending")
    add_requests(engine, 1, state="pending", key="other")
    with engine.connect() as connection:
        assert outbound_requests.waiting(connection, "clinic", ["lab"]) == 2
        assert outbound_requests.waiting(connection, "clinic", ["lab", "other"]) == 3
    door.enable()
    door.rows(
        "INSERT INTO deliveries (message_id, received_at, destination_id, handler, lane, inline) "
        "SELECT 1, now(), id, 'register', 'register/clinic/x', false FROM destinations"
    )
    with engine.connect() as connection:
        assert outbound_requests.waiting(connection, "clinic", ["lab"]) == 3
        assert outbound_requests.waiting(connection, "elsewhere", ["lab"]) == 2
