"""Corrections of lanes: release."""

from __future__ import annotations

import pytest

from receiver.errors import Conflict, NotFound
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.operations.corrections.lane_corrections import LaneCorrections
from tests.storage.door import Door, body, handler
from tests.storage.hand import LANE, Hand, arrive
from tests.storage.operations.corrections.helpers import now


class TestLanes:
    def test_release_lets_the_head_run_once_more(
        self, door: Door, ledger: MessageLedger, lane_corrections: LaneCorrections, hand: Hand
    ) -> None:
        """A released lane can be claimed, and starts with the delivery that held it."""
        door.enable(handler(on_failure="hold"))
        arrive(door, ledger, body())
        number = hand.take().fail("pending", lane_state="held")
        lane_corrections.release(LANE, now(), reason=None)
        assert hand.take().begin() == number

    def test_only_a_held_one(
        self, door: Door, ledger: MessageLedger, lane_corrections: LaneCorrections, hand: Hand
    ) -> None:
        """A lane that is not held, and one that does not exist, are different errors."""
        door.enable()
        arrive(door, ledger, body())
        with pytest.raises(NotFound):
            lane_corrections.release(LANE, now(), reason=None)
        hand.take()
        with pytest.raises(Conflict, match="not held"):
            lane_corrections.release(LANE, now(), reason=None)
