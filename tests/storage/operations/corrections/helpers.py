"""Helpers of the tests of corrections."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from receiver.storage.operations.corrections.batches import CorrectionBatch, CorrectionTask
from tests.storage.door import Door
from tests.storage.hand import Hand

ACTOR: Final = "alice@ops1"
REASON: Final = "register lost the patient, fixed in 1.4.2"


def now() -> datetime:
    """Return the current time."""
    return datetime.now(UTC)


def carry_out(task: CorrectionTask) -> list[CorrectionBatch]:
    """Run all batches."""
    return list(task.batches)


def only_batch(task: CorrectionTask) -> CorrectionBatch:
    """Run the task, which must have exactly one batch, and return it."""
    (batch,) = task.batches
    return batch


def delivery_states(door: Door) -> list[str]:
    """Return the state of each delivery, in the order of ids."""
    return [row.state for row in door.rows("SELECT state FROM deliveries ORDER BY id")]


def whys(batch: CorrectionBatch) -> list[str]:
    """Return why each row was left unchanged."""
    return [each.why for each in batch.left]


def fail_next(hand: Hand, count: int, **how: Any) -> list[int]:
    """Run the next `count` deliveries of the lane so that they end dead. Returns their ids."""
    return [hand.take().fail(**how) for _ in range(count)]
