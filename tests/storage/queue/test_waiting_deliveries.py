"""Waiting deliveries: which are read, and in which order."""

from __future__ import annotations

import pytest

from receiver.storage.queue import leases, outcomes, waiting_deliveries
from tests.storage.queue.rows import Rows, many


def test_a_batch(rows: Rows) -> None:
    """A batch holds the next deliveries in the order of ids, with their payloads, up to BATCH_ROWS."""
    ids = rows.add(count=waiting_deliveries.BATCH_ROWS + 5)
    rows.add(inline=True)
    lease = rows.claim()
    first = waiting_deliveries.batch(rows.connection, lease)

    assert [each.id for each in first] == ids[: waiting_deliveries.BATCH_ROWS]
    assert (first[0].attempts, first[0].lost, first[0].deferred_for, first[0].sealed) == (0, False, 0.0, b"s")
    assert [each.id for each in waiting_deliveries.batch(rows.connection, lease, after=first[-1].id)] == ids[
        waiting_deliveries.BATCH_ROWS :
    ]
    assert waiting_deliveries.batch(rows.connection, lease, after=ids[-1]) == []


def test_a_batch_of_large_payloads(rows: Rows) -> None:
    """A batch is limited in bytes, but holds at least one delivery."""
    ids = rows.add(count=3, size=waiting_deliveries.BATCH_BYTES * 3 // 4) + rows.add(
        size=10 * waiting_deliveries.BATCH_BYTES
    )
    lease = rows.claim()

    assert [each.id for each in waiting_deliveries.batch(rows.connection, lease)] == ids[:2]
    assert [each.id for each in waiting_deliveries.batch(rows.connection, lease, after=ids[2])] == ids[3:]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE lanes SET epoch = epoch + 1",
        "UPDATE lanes SET owner = NULL",
        "UPDATE subscriptions SET paused_at = now()",
    ],
)
def test_nothing_to_read(rows: Rows, change: str) -> None:
    """Nothing is read without the lease, or while the handler is paused."""
    [delivery] = rows.add()
    lease = rows.claim()
    rows.do(change)

    assert waiting_deliveries.batch(rows.connection, lease) == []
    assert outcomes.start(rows.connection, lease, delivery) is None
    assert rows.one("SELECT attempts FROM deliveries") == (0,)


def test_an_inline_batch(rows: Rows) -> None:
    """A request reads its inline deliveries, up to its own."""
    ids = rows.add(count=3, inline=True)
    rows.add()
    lease = rows.claim(inline=True)
    assert [each.id for each in waiting_deliveries.batch(rows.connection, lease, inline=True, up_to=ids[1])] == ids[:2]


def test_an_unordered_batch(rows: Rows) -> None:
    """In an unordered lane, deliveries whose pause is over come first, and those still pausing are left out."""
    lane = "h/lab/any:3"
    ids = rows.add(lane, count=4)
    rows.do("UPDATE deliveries SET ready_at = now() + interval '1 hour' WHERE id = :id", id=ids[0])
    rows.do("UPDATE deliveries SET ready_at = now() WHERE id = :id", id=ids[2])
    lease = rows.claim(lane)

    assert [each.id for each in waiting_deliveries.batch(rows.connection, lease, unordered=True)] == [
        ids[2],
        ids[1],
        ids[3],
    ]
    assert [each.id for each in waiting_deliveries.batch(rows.connection, lease, unordered=True, after=ids[1])] == [
        ids[2],
        ids[3],
    ]


def test_heads(rows: Rows) -> None:
    """The first few deliveries of several lanes are read together, with their payloads; none of a lane whose lease is
    lost.
    """
    names = many(rows, 3, waiting_deliveries.HEADS + 1)
    claimed = leases.claim_some(rows.connection, names, "w1", 60)
    rows.do("UPDATE lanes SET epoch = epoch + 1 WHERE lane = :lane", lane=names[1])
    read = waiting_deliveries.heads(rows.connection, claimed)

    assert [len(each) for each in read] == [waiting_deliveries.HEADS, 0, waiting_deliveries.HEADS]
    assert read[2] == waiting_deliveries.batch(rows.connection, claimed[2])[: waiting_deliveries.HEADS]
    rows.do("UPDATE messages SET size = :size", size=waiting_deliveries.BATCH_BYTES)
    assert [len(each) for each in waiting_deliveries.heads(rows.connection, claimed)] == [1, 0, 0]
    rows.do("UPDATE subscriptions SET paused_at = now()")
    assert waiting_deliveries.heads(rows.connection, claimed) == [[], [], []]
