"""Queries of deliveries and lanes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine

from receiver.errors import NotFound
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.operations import queries
from receiver.storage.operations.queries import DeliveryFilter, MessageFilter
from tests.storage.door import DESTINATION, Door, body, handler
from tests.storage.hand import FRAMES, LANE, Hand, arrive
from tests.storage.operations.queries.helpers import now


class TestDeliveries:
    @pytest.fixture
    def made(self, door: Door, ledger: MessageLedger, engine: Engine) -> list[int]:
        """Three deliveries: dead, running, pending."""
        door.enable()
        arrive(door, ledger, *(body(f"log-{each}") for each in range(3)))
        Hand(engine).take().fail()
        Hand(engine).take().begin()
        return [row.id for row in door.rows("SELECT id FROM deliveries ORDER BY id")]

    def test_newest_first_with_what_runs(self, made: list[int], ask: Callable[..., Any]) -> None:
        """A delivery shows its message and kind, and whether it is running."""
        found = ask(queries.deliveries, DeliveryFilter(), limit=9)
        assert [(each["id"], each["state"], each["running"]) for each in found] == [
            (made[2], "pending", False),
            (made[1], "pending", True),
            (made[0], "dead", False),
        ]
        assert {each["kind"] for each in found} == {"PatientAdmin.Arrival"}
        assert all(isinstance(each["message_uuid"], UUID) for each in found)
        assert [each["id"] for each in ask(queries.deliveries, DeliveryFilter(), before=made[2], limit=1)] == [made[1]]

    def test_an_attempt_whose_lease_is_over_does_not_run(
        self, made: list[int], door: Door, ask: Callable[..., Any]
    ) -> None:
        """An attempt whose lease has ended is not running."""
        door.rows("UPDATE lanes SET lease_until = now() - interval '1 second'")
        assert not any(each["running"] for each in ask(queries.deliveries, DeliveryFilter(), limit=9))

    @pytest.mark.parametrize(
        ("where", "found"),
        [
            ({"handler": "register"}, 3),
            ({"handler": "other"}, 0),
            ({"state": "dead"}, 1),
            ({"error_class": "KeyError"}, 1),
            ({"lane": LANE}, 3),
            ({"destination": DESTINATION}, 3),
            ({"since": datetime(2999, 1, 1, tzinfo=UTC)}, 0),
        ],
    )
    def test_filters(self, made: list[int], ask: Callable[..., Any], where: dict[str, Any], found: int) -> None:
        """Each filter is a column; all that are given must hold."""
        assert len(ask(queries.deliveries, DeliveryFilter(**where), limit=9)) == found

    def test_since_is_when_it_ended(self, made: list[int], door: Door, ask: Callable[..., Any]) -> None:
        """`since` compares the end of a finished delivery."""
        door.rows("UPDATE deliveries SET created_at = now() - interval '1 day'")
        found = ask(queries.deliveries, DeliveryFilter(since=now() - timedelta(hours=1)), limit=9)
        assert [each["id"] for each in found] == [made[0]]

    def test_one_with_its_attempts(self, made: list[int], ask: Callable[..., Any]) -> None:
        """A delivery shows its attempts in order, with frames, and without the text of an error."""
        found = ask(queries.delivery, made[0])
        assert [(each["attempt"], each["outcome"], each["error_frames"]) for each in found["delivery_attempts"]] == [
            (1, "failed", FRAMES)
        ]
        assert found["error_frames"] == FRAMES
        assert "error_sealed" not in found
        with pytest.raises(NotFound):
            ask(queries.delivery, 999)

    def test_nothing_asked_for_is_told_apart(self) -> None:
        """A filter without conditions is recognized."""
        assert queries.empty(DeliveryFilter())
        assert not queries.empty(DeliveryFilter(state="dead"))
        assert queries.empty(MessageFilter())
        assert not queries.empty(MessageFilter(ids=(1,)))


class TestLanes:
    def test_a_lane_that_never_ran(self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]) -> None:
        """A lane without a row is ready, with the number and the age of its deliveries."""
        door.enable()
        arrive(door, ledger, body("1"), body("2"))
        (found,) = ask(queries.lanes, limit=9)
        assert (found["lane"], found["state"], found["pending"], found["handler"]) == (LANE, "ready", 2, "register")
        assert found["head"] == door.value("SELECT min(id) FROM deliveries")
        assert found["oldest_pending_at"] == door.value("SELECT min(created_at) FROM deliveries")

    def test_the_states(self, door: Door, ledger: MessageLedger, engine: Engine, ask: Callable[..., Any]) -> None:
        """Running, waiting, held and paused lanes are distinguished, and can be selected by state."""
        door.enable()
        arrive(door, ledger, body("1"), body("2"))
        hand = Hand(engine)

        def state() -> str:
            (found,) = ask(queries.lanes, limit=9)
            assert ask(queries.lanes, state=found["state"], limit=9) == [found]
            return str(found["state"])

        hand.take().begin()
        assert state() == "running"
        hand.leave()
        door.rows("UPDATE lanes SET state = 'waiting', ready_at = now() + interval '1 hour'")
        assert state() == "waiting"
        door.registration.pause_handler("register", now(), destination=None, reason="operator")
        assert state() == "paused"
        door.rows("UPDATE lanes SET state = 'held'")
        assert state() == "held"

    def test_where_nothing_waits(
        self, door: Door, ledger: MessageLedger, engine: Engine, ask: Callable[..., Any]
    ) -> None:
        """A lane without pending deliveries is listed only if it runs or is held."""
        door.enable()
        arrive(door, ledger, body("1"))
        hand = Hand(engine).take()
        hand.succeed()
        assert [each["state"] for each in ask(queries.lanes, limit=9)] == ["running"]
        hand.leave()
        assert ask(queries.lanes, limit=9) == []
        door.rows("UPDATE lanes SET state = 'held'")
        assert [(each["state"], each["pending"]) for each in ask(queries.lanes, limit=9)] == [("held", 0)]

    def test_filters(self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]) -> None:
        """By handler and by destination, the longest waiting first."""
        door.enable()
        door.enable(handler("other", ordering="patient", patient_key="MR"))
        arrive(door, ledger, body("1"))
        assert len(ask(queries.lanes, limit=9)) == 2
        assert len(ask(queries.lanes, limit=1)) == 1
        assert [each["handler"] for each in ask(queries.lanes, handler="other", limit=9)] == ["other"]
        assert len(ask(queries.lanes, destination=DESTINATION, limit=9)) == 2
        with pytest.raises(NotFound):
            ask(queries.lanes, destination="nowhere", limit=9)
