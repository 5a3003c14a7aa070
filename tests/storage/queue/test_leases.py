"""Leases: claims, renewals and releases, on a real PostgreSQL."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import sqlstate
from receiver.storage.queue import leases
from receiver.storage.queue.leases import Lease
from tests.storage.queue.rows import LANE, Rows, many


def test_a_claim(rows: Rows) -> None:
    """One owner holds a lane at a time, and each claim has a higher epoch than the one before."""
    rows.add()
    first = rows.claim(owner="w1")
    assert leases.claim(rows.other, LANE, "w2", 60) is None
    leases.release(rows.connection, first)
    second = rows.claim(owner="w2")

    assert (first.epoch, second.epoch) == (1, 2)
    leases.release(rows.connection, first)  # no longer its own
    assert rows.one("SELECT owner, epoch FROM lanes") == ("w2", 2)


def test_an_expired_lease(rows: Rows) -> None:
    """Another owner takes over a lane whose lease has ended; the late owner can neither renew nor release it."""
    rows.add()
    late = rows.claim(owner="w1")
    rows.do("UPDATE lanes SET lease_until = now() - interval '1 second'")
    lease = leases.claim(rows.other, LANE, "w2", 60)

    assert lease == Lease(lane=LANE, epoch=2, owner="w2")
    assert leases.renew(rows.connection, "w1", {LANE: late.epoch}, 60) == set()
    assert not leases.renew_one(rows.connection, late, 60)


@pytest.mark.parametrize(
    ("change", "had"),
    [
        ("UPDATE subscriptions SET paused_at = now()", False),
        ("UPDATE subscriptions SET enabled = false", False),
        ("DELETE FROM subscriptions", False),
        ("UPDATE deliveries SET state = 'dead'", False),
        ("UPDATE deliveries SET inline = true", False),
        ("UPDATE lanes SET state = 'held'", False),
        ("UPDATE lanes SET state = 'waiting', ready_at = now() + interval '1 hour'", False),
        ("UPDATE lanes SET state = 'waiting', ready_at = now()", True),
        ("UPDATE destinations SET enabled = false", True),
    ],
)
def test_claimable(rows: Rows, change: str, had: bool) -> None:
    """A lane cannot be claimed while its handler is paused or disabled, while it is held or waits, or if nothing in it
    is pending. A disabled destination receives nothing more, but what it has received runs.
    """
    rows.add()
    leases.release(rows.connection, rows.claim())
    rows.do(change)

    assert (leases.claim(rows.connection, LANE, "w", 60) is not None) == had


def test_a_claim_makes_a_waiting_lane_ready(rows: Rows) -> None:
    """The claim of a lane whose pause is over makes it ready."""
    rows.add()
    leases.release(rows.connection, rows.claim())
    rows.do("UPDATE lanes SET state = 'waiting', ready_at = now()")
    rows.claim()
    assert rows.one("SELECT state, ready_at FROM lanes") == ("ready", None)


def test_inline_lanes(rows: Rows) -> None:
    """Only a request can claim a lane for its inline deliveries."""
    rows.add(inline=True)
    assert leases.claim(rows.connection, LANE, "w", 60) is None
    assert leases.claim(rows.connection, LANE, "r", 60, inline=True) is not None


def test_many_claim_one_lane(rows: Rows, engine: Engine) -> None:
    """If several processes claim a lane at the same moment, exactly one gets it."""
    rows.add()
    claims: list[Lease | None] = []
    start = threading.Barrier(4)

    def claim(owner: str) -> None:
        with engine.connect() as connection:
            start.wait(30)
            claims.append(leases.claim(connection.execution_options(isolation_level="AUTOCOMMIT"), LANE, owner, 60))

    threads = [threading.Thread(target=claim, args=(f"w{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    start.wait(30)
    for thread in threads:
        thread.join(30)
    assert sorted(each is None for each in claims) == [False, True, True]


def test_renewing(rows: Rows) -> None:
    """Leases are renewed together.

    One that the commit of an outcome locks is left out, and renewed by itself with a lock timeout.
    """
    rows.add()
    rows.add("h/lab/source:s2")
    one, two = rows.claim(), rows.claim("h/lab/source:s2")
    rows.do("UPDATE lanes SET lease_until = now() + interval '1 second'")
    rows.other.execution_options(isolation_level="READ COMMITTED")
    rows.other.execute(text("SELECT FROM lanes WHERE lane = :lane FOR NO KEY UPDATE"), {"lane": LANE})
    held = {one.lane: one.epoch, two.lane: two.epoch}

    assert leases.renew(rows.connection, "w1", held, 60) == {two.lane}
    with pytest.raises(SQLAlchemyError) as caught:
        leases.renew_one(rows.connection, one, 60)
    assert sqlstate(caught.value) == "55P03"  # it did not wait for ever
    rows.other.rollback()
    assert leases.renew_one(rows.connection, one, 60)
    assert rows.one("SELECT min(lease_until) > now() + interval '50 seconds' FROM lanes") == (True,)


def test_claim_some(rows: Rows) -> None:
    """`claim_some` claims new and free lanes, in the order of their names.

    It skips lanes of another owner, held lanes, empty lanes, and lanes with only inline deliveries.
    """
    names = many(rows, 5)
    leases.release(rows.connection, rows.claim(names[1]))
    rows.claim(names[2], owner="w2")
    leases.release(rows.connection, rows.claim(names[3]))
    rows.do("UPDATE lanes SET state = 'held' WHERE lane = :lane", lane=names[3])
    rows.add("h/lab/source:900", inline=True)

    had = leases.claim_some(rows.connection, [*reversed(names), "h/lab/source:900", "h/lab/source:nothing"], "w1", 60)
    assert had == [
        Lease(lane=names[0], epoch=1, owner="w1"),
        Lease(lane=names[1], epoch=2, owner="w1"),
        Lease(lane=names[4], epoch=1, owner="w1"),
    ]
    assert rows.one(
        "SELECT count(*) FROM lanes WHERE owner = 'w1' AND handler = 'h' AND destination_id = 1 "
        "AND lease_until > now() + interval '50 seconds'"
    ) == (3,)
    assert leases.claim_some(rows.other, names, "w3", 60) == []
    leases.release(rows.connection, *had)
    assert rows.one("SELECT count(*) FROM lanes WHERE owner = 'w1'") == (0,)
    rows.do("UPDATE subscriptions SET paused_at = now()")
    assert leases.claim_some(rows.other, names, "w3", 60) == []


def test_claim_some_does_not_block(rows: Rows) -> None:
    """`claim_some` skips a lane that another transaction locks, and does not wait for it."""
    names = many(rows, 2)
    for name in names:
        leases.release(rows.connection, rows.claim(name))
    rows.other.execution_options(isolation_level="READ COMMITTED")
    rows.other.execute(text("SELECT FROM lanes WHERE lane = :lane FOR NO KEY UPDATE"), {"lane": names[0]})
    assert [lease.lane for lease in leases.claim_some(rows.connection, names, "w1", 60)] == names[1:]
    rows.other.rollback()
