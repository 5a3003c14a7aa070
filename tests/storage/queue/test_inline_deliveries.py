"""Inline deliveries, which run within a request."""

from __future__ import annotations

from receiver.storage.queue import inline_deliveries
from tests.storage.queue.rows import LANE, Rows


def test_an_inline_delivery(rows: Rows) -> None:
    """A request sees whether its delivery is still pending."""
    [delivery] = rows.add(inline=True)
    [other] = rows.add("h/lab/source:s2")
    assert inline_deliveries.inline_delivery(rows.connection, delivery) == (LANE, True)
    assert inline_deliveries.inline_delivery(rows.connection, other) is None
    rows.do("UPDATE deliveries SET state = 'succeeded' WHERE id = :id", id=delivery)
    assert inline_deliveries.inline_delivery(rows.connection, delivery) == (LANE, False)


def test_handed_to_workers(rows: Rows) -> None:
    """`hand_to_workers` makes pending inline deliveries ordinary; `workers_first` finds the ones before a delivery."""
    first, second = rows.add(count=2, inline=True)
    assert not inline_deliveries.workers_first(rows.connection, LANE, second)
    inline_deliveries.hand_to_workers(rows.connection, LANE)
    assert inline_deliveries.workers_first(rows.connection, LANE, second)
    assert not inline_deliveries.workers_first(rows.connection, LANE, first)
    assert inline_deliveries.inline_delivery(rows.connection, second) is None
