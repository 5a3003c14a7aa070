"""Corrections of deliveries: retry and skip."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.operations.corrections.batches import CorrectionBatch
from receiver.storage.operations.corrections.delivery_corrections import DeliveryCorrections
from receiver.storage.operations.queries import DeliveryFilter
from tests.storage.door import Door, body, handler
from tests.storage.hand import LANE, Hand, arrive
from tests.storage.operations.corrections.helpers import (
    REASON,
    carry_out,
    delivery_states,
    fail_next,
    now,
    only_batch,
    whys,
)


class TestRetry:
    def test_a_dead_delivery_runs_again_as_itself(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, hand: Hand
    ) -> None:
        """Retry keeps the delivery's id and generation, so its idempotency key, and resets its attempts."""
        door.enable()
        arrive(door, ledger, body())
        (dead,) = fail_next(hand, 1)

        batch = only_batch(delivery_corrections.retry(DeliveryFilter(ids=(dead,)), now(), reason=REASON))

        assert batch == CorrectionBatch(done=(dead,), left=(), last=dead, lanes=(LANE,))
        (row,) = door.rows("SELECT id, state, attempts, generation, finished_at, started_at FROM deliveries")
        assert tuple(row) == (dead, "pending", 0, 1, None, None)

    def test_it_keeps_its_place(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, hand: Hand
    ) -> None:
        """A retried delivery runs before later ones that are still pending."""
        door.enable()
        arrive(door, ledger, body("first"), body("second"))
        (dead,) = fail_next(hand, 1)
        carry_out(delivery_corrections.retry(DeliveryFilter(ids=(dead,)), now(), reason=REASON))

        following = hand.take().next()
        assert following is not None
        assert following.id == dead

    def test_filters_mean_the_dead(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, hand: Hand
    ) -> None:
        """Filters without a state select dead deliveries only."""
        door.enable()
        arrive(door, ledger, *(body(f"log-{each}") for each in range(4)))
        fail_next(hand, 1, error_class="KeyError")
        fail_next(hand, 1, error_class="ValueError")
        hand.take().succeed()
        hand.leave()

        where = DeliveryFilter(handler="register", error_class="KeyError", destination="clinic")
        assert len(only_batch(delivery_corrections.retry(where, now(), reason=REASON)).done) == 1
        assert delivery_states(door) == ["pending", "dead", "succeeded", "pending"]

    def test_a_success_is_never_repeated(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, hand: Hand
    ) -> None:
        """A succeeded delivery is left unchanged, and the reason names `messages replay`."""
        door.enable()
        arrive(door, ledger, body())
        hand.take().succeed()
        hand.leave()
        number = door.value("SELECT id FROM deliveries")

        batch = only_batch(delivery_corrections.retry(DeliveryFilter(ids=(number,)), now(), reason=REASON))
        assert batch.done == ()
        assert "messages replay" in whys(batch)[0]
        assert delivery_states(door) == ["succeeded"]

    def test_one_that_waits_for_its_next_attempt_waits_no_longer(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, hand: Hand
    ) -> None:
        """Retry of a pending delivery ends its pause and its lane's."""
        door.enable()
        arrive(door, ledger, body())
        number = hand.take().fail("pending", lane_state="waiting", pause=600)

        carry_out(delivery_corrections.retry(DeliveryFilter(ids=(number,)), now(), reason=REASON))

        assert door.rows("SELECT state, ready_at FROM lanes") == [("ready", None)]
        assert hand.take().begin() == number

    def test_a_held_lane_goes_on(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, hand: Hand
    ) -> None:
        """A held lane continues when the delivery that holds it is retried."""
        door.enable(handler(on_failure="hold"))
        arrive(door, ledger, body())
        number = hand.take().fail("pending", lane_state="held")
        assert door.value("SELECT state FROM lanes") == "held"

        carry_out(delivery_corrections.retry(DeliveryFilter(ids=(number,)), now(), reason=REASON))
        assert hand.take().begin() == number

    def test_another_delivery_does_not_free_a_held_lane(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, hand: Hand
    ) -> None:
        """A held lane stays held when another delivery is retried."""
        door.enable()
        arrive(door, ledger, body("first"), body("second"))
        (dead,) = fail_next(hand, 1)
        hand.take().fail("pending", lane_state="held")

        carry_out(delivery_corrections.retry(DeliveryFilter(ids=(dead,)), now(), reason=REASON))
        assert door.value("SELECT state FROM lanes") == "held"

    def test_what_ran_in_a_request_becomes_a_workers(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections
    ) -> None:
        """A retried inline delivery becomes an ordinary one, which a worker runs."""
        door.enable(handler(acknowledge="after_handling"))
        arrive(door, ledger, body())
        door.rows("UPDATE deliveries SET state = 'dead'")
        assert door.value("SELECT inline FROM deliveries") is True

        carry_out(delivery_corrections.retry(DeliveryFilter(state="dead"), now(), reason=REASON))
        assert door.rows("SELECT state, inline FROM deliveries") == [("pending", False)]

    def test_newer_messages_that_were_handled_are_counted(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, hand: Hand
    ) -> None:
        """The newer messages of the lane that succeeded are counted, each once."""
        door.enable()
        door.enable(handler("other"))
        arrive(door, ledger, *(body(f"log-{each}") for each in range(5)))
        dead = fail_next(hand, 2)
        hand.take().succeed(2)
        hand.leave()

        assert only_batch(delivery_corrections.retry(DeliveryFilter(ids=tuple(dead)), now(), reason=REASON)).newer == 2

    def test_where_there_is_no_order_nothing_is_newer(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, engine: Engine
    ) -> None:
        """In unordered lanes nothing is counted as newer."""
        door.enable(handler(ordering="none"))
        arrive(door, ledger, *(body(f"log-{each}") for each in range(3)))
        door.rows("UPDATE deliveries SET lane = 'register/clinic/any:0', state = 'succeeded'")
        door.rows("UPDATE deliveries SET state = 'dead' WHERE id = (SELECT min(id) FROM deliveries)")

        assert only_batch(delivery_corrections.retry(DeliveryFilter(state="dead"), now(), reason=REASON)).newer == 0


class TestSkip:
    @pytest.mark.parametrize("state", ["pending", "dead"])
    def test_skip(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, state: str
    ) -> None:
        """Pending and dead deliveries can be skipped, and then have an end."""
        door.enable()
        arrive(door, ledger, body())
        door.rows("UPDATE deliveries SET state = :state", state=state)
        number = door.value("SELECT id FROM deliveries")

        assert only_batch(delivery_corrections.skip(DeliveryFilter(ids=(number,)), now(), reason=REASON)).done == (
            number,
        )
        (row,) = door.rows("SELECT state, finished_at FROM deliveries")
        assert row.state == "skipped"
        assert row.finished_at is not None

    def test_a_held_lane_goes_on_behind_it(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, hand: Hand
    ) -> None:
        """When the delivery that holds a lane is skipped, the next one runs."""
        door.enable(handler(on_failure="hold"))
        arrive(door, ledger, body("first"), body("second"))
        number = hand.take().fail("pending", lane_state="held")

        carry_out(delivery_corrections.skip(DeliveryFilter(ids=(number,)), now(), reason=REASON))
        assert hand.take().begin() > number

    def test_what_runs_now_is_left(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, hand: Hand
    ) -> None:
        """A running delivery is left unchanged, its lane is named, and its success is recorded."""
        door.enable()
        arrive(door, ledger, body("first"), body("second"))
        running = hand.take().begin()

        batch = only_batch(
            delivery_corrections.skip(DeliveryFilter(handler="register", state="pending"), now(), reason=REASON)
        )

        assert LANE in whys(batch)[0]
        assert [each.id for each in batch.left] == [running]
        assert delivery_states(door) == ["pending", "skipped"]

    def test_what_its_worker_lost_can_be_skipped(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, hand: Hand
    ) -> None:
        """A delivery whose lease has ended can be skipped, and the late worker records nothing."""
        door.enable()
        arrive(door, ledger, body())
        number = hand.take().begin()
        door.rows("UPDATE lanes SET lease_until = now() - interval '1 second'")

        assert only_batch(delivery_corrections.skip(DeliveryFilter(ids=(number,)), now(), reason=REASON)).done == (
            number,
        )
        with pytest.raises(AssertionError):
            hand.succeed()
        assert delivery_states(door) == ["skipped"]

    def test_what_is_skipped_stays_so(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections
    ) -> None:
        """A second skip changes nothing, and reports it."""
        door.enable()
        arrive(door, ledger, body())
        where = DeliveryFilter(ids=(door.value("SELECT id FROM deliveries"),))
        carry_out(delivery_corrections.skip(where, now(), reason=REASON))
        assert whys(only_batch(delivery_corrections.skip(where, now(), reason=REASON))) == ["skipped already"]
