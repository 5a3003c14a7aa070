"""Runs deliveries of a lane step by step, as a worker does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from sqlalchemy import Engine

from receiver.pipeline import Admitted, Receipt
from receiver.storage.queue import leases, outcomes, waiting_deliveries
from receiver.storage.queue.leases import Lease
from receiver.storage.queue.outcomes import DeliveryFailure
from receiver.storage.queue.waiting_deliveries import WaitingDelivery
from tests.storage.door import SOURCE, Door

LANE = f"register/clinic/source:{SOURCE}"
FRAMES = ["clinic.register:12:register", "clinic.people:7:find"]


class Hand:
    """Holds one lane. Each step is a transaction, as a worker's are."""

    def __init__(self, engine: Engine, lane: str = LANE) -> None:
        self._engine = engine
        self._lane = lane
        self._attempt = 0

    def _do(self, verb: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with self._engine.begin() as connection:
            return verb(connection, *arguments, **options)

    def take(self, seconds: float = 30.0) -> Hand:
        """Claim the lane."""
        lease = self._do(leases.claim, self._lane, "hand-1", seconds)
        assert isinstance(lease, Lease), "the lane is not to be had"
        self.lease = lease
        return self

    def next(self) -> WaitingDelivery | None:
        """Return the next delivery, without starting it."""
        found = self._do(waiting_deliveries.batch, self.lease)
        return found[0] if found else None

    def begin(self) -> int:
        """Start the next delivery. Returns its id."""
        delivery = self.next()
        assert delivery is not None, "nothing is next"
        self._attempt = self._do(outcomes.start, self.lease, delivery.id)
        return delivery.id

    def succeed(self, count: int = 1) -> None:
        """Run this many deliveries successfully."""
        for _ in range(count):
            assert self._do(outcomes.succeed, self.lease, self.begin(), self._attempt, following=None)[0]

    def fail(
        self,
        state: str = "dead",
        *,
        error_class: str = "KeyError",
        lane_state: str | None = None,
        pause: float | None = None,
    ) -> int:
        """Run the next delivery so that it fails, and release the lane. Returns its id."""
        delivery = self.begin()
        failure = DeliveryFailure(
            outcome="failed",
            state=state,
            error_class=error_class,
            error_frames=FRAMES,
            pause=pause,
            lane_state=lane_state,
            release=True,
        )
        assert self._do(outcomes.fail, self.lease, delivery, self._attempt, failure)
        return delivery

    def leave(self) -> None:
        """Release the lane."""
        self._do(leases.release, self.lease)


def arrive(door: Door, ledger: Any, *contents: bytes) -> list[int]:
    """Accept bodies one after another, and wait for their COMMIT. Returns the messages' ids."""
    waiting: list[Future[Receipt]] = [ledger.accept(_admitted(door, content)) for content in contents]
    return [each.result(30).message_id for each in waiting]


def _admitted(door: Door, content: bytes) -> Admitted:
    return door.admit(content)
