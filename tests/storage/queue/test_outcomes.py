"""Outcomes: successes and failures, recorded only under the lease."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import text

from receiver.storage.queue import leases, outcomes, waiting_deliveries
from receiver.storage.queue.leases import Lease
from receiver.storage.queue.outcomes import DeliveryFailure
from tests.storage.queue.rows import LANE, Rows, many


def failure(**more: Any) -> DeliveryFailure:
    """Return a failure that is retried."""
    return DeliveryFailure(**{"outcome": "failed", "state": "pending", "error_class": "E", **more})


def test_success_starts_the_next(rows: Rows) -> None:
    """The statement that records a success starts the next delivery."""
    first, second = rows.add(count=2)
    lease = rows.claim()
    assert outcomes.start(rows.connection, lease, first) == 1
    assert rows.one("SELECT epoch, started_at IS NULL FROM deliveries WHERE id = :id", id=first) == (1, False)

    assert outcomes.succeed(rows.connection, lease, first, 1, following=second) == (True, 1)
    assert outcomes.succeed(rows.connection, lease, second, 1, following=None) == (True, None)
    assert rows.connection.execute(
        text("SELECT delivery_id, attempt, epoch, worker, outcome FROM delivery_attempts ORDER BY id")
    ).all() == [(first, 1, 1, "w1", "succeeded"), (second, 1, 1, "w1", "succeeded")]


def test_success_where_the_next_was_skipped(rows: Rows) -> None:
    """A success is recorded even if the next delivery was skipped."""
    first, second = rows.add(count=2)
    lease = rows.claim()
    outcomes.start(rows.connection, lease, first)
    rows.do("UPDATE deliveries SET state = 'skipped' WHERE id = :id", id=second)
    assert outcomes.succeed(rows.connection, lease, first, 1, following=second) == (True, None)


@pytest.mark.parametrize(
    ("change", "started"),
    [
        ("SELECT 1", 1),
        ("UPDATE lanes SET epoch = 9 WHERE lane LIKE '%001'", None),
        ("UPDATE lanes SET owner = NULL WHERE lane LIKE '%001'", None),
    ],
)
def test_success_starts_a_delivery_of_another_lane(rows: Rows, change: str, started: int | None) -> None:
    """A success starts the next delivery in another lane of the same owner, if its lease is held.

    The success is recorded in any case.
    """
    first, second = leases.claim_some(rows.connection, many(rows, 2), "w1", 60)
    one, two = (waiting_deliveries.batch(rows.connection, lease)[0].id for lease in (first, second))
    outcomes.start(rows.connection, first, one)
    rows.do(change)

    assert outcomes.succeed(rows.connection, first, one, 1, following=two, next_lease=second) == (True, started)
    assert rows.one("SELECT state, epoch FROM deliveries WHERE id = :id", id=one) == ("succeeded", 1)
    assert rows.one("SELECT attempts, epoch FROM deliveries WHERE id = :id", id=two) == (started or 0, started)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE lanes SET epoch = epoch + 1",
        "UPDATE lanes SET owner = 'w2'",
        "UPDATE lanes SET owner = NULL",
        "DELETE FROM lanes",
        "UPDATE deliveries SET attempts = 2",
        "UPDATE deliveries SET state = 'skipped'",
    ],
)
def test_fenced(rows: Rows, change: str) -> None:
    """Without the lease, neither a success nor a failure is recorded."""
    first, second = rows.add(count=2)
    lease = rows.claim()
    outcomes.start(rows.connection, lease, first)
    rows.do(change)
    before = rows.connection.execute(text("SELECT * FROM deliveries ORDER BY id")).all()

    assert outcomes.succeed(rows.connection, lease, first, 1, following=second) == (False, None)
    assert not outcomes.fail(rows.connection, lease, first, 1, failure())
    assert rows.connection.execute(text("SELECT * FROM deliveries ORDER BY id")).all() == before
    assert rows.one("SELECT count(*) FROM delivery_attempts") == (0,)


def test_a_takeover_waits_for_a_commit(rows: Rows) -> None:
    """A claim after the end of the lease waits for an outcome that is being committed."""
    [delivery] = rows.add()
    lease = rows.claim()
    outcomes.start(rows.connection, lease, delivery)
    rows.do("UPDATE lanes SET lease_until = now() - interval '1 second'")
    rows.other.execution_options(isolation_level="READ COMMITTED")
    assert outcomes.succeed(rows.other, lease, delivery, 1, following=None) == (True, None)
    taken: list[Lease | None] = []
    taking = threading.Thread(target=lambda: taken.append(leases.claim(rows.connection, LANE, "w2", 60)))
    taking.start()
    taking.join(0.3)
    assert taken == []
    rows.other.commit()
    taking.join(30)

    assert rows.one("SELECT state FROM deliveries") == ("succeeded",)
    assert taken in ([Lease(lane=LANE, epoch=2, owner="w2")], [None])


def test_a_takeover_before_a_commit(rows: Rows) -> None:
    """An outcome that arrives after another owner's claim is not recorded."""
    [delivery] = rows.add()
    lease = rows.claim()
    outcomes.start(rows.connection, lease, delivery)
    rows.do("UPDATE lanes SET lease_until = now() - interval '1 second'")
    rows.other.execution_options(isolation_level="READ COMMITTED")
    assert leases.claim(rows.other, LANE, "w2", 60) is not None
    recorded: list[Any] = []
    recording = threading.Thread(
        target=lambda: recorded.append(outcomes.succeed(rows.connection, lease, delivery, 1, following=None))
    )
    recording.start()
    recording.join(0.3)
    assert recorded == []
    rows.other.commit()
    recording.join(30)
    assert recorded == [(False, None)]


def test_a_failure(rows: Rows) -> None:
    """A failure keeps the error and its frames, and the lane waits."""
    [delivery] = rows.add()
    lease = rows.claim()
    outcomes.start(rows.connection, lease, delivery)
    assert outcomes.fail(
        rows.connection,
        lease,
        delivery,
        1,
        failure(
            error_frames=("m:1:f", "m:2:g"), error_key="k", error_sealed=b"\x00sealed", pause=60.0, lane_state="waiting"
        ),
    )

    assert rows.one(
        "SELECT state, attempts, error_class, error_frames, error_key, error_sealed, finished_at, "
        "started_at, deferred_since, ready_at > now() + interval '50 seconds' FROM deliveries"
    ) == ("pending", 1, "E", ["m:1:f", "m:2:g"], "k", b"\x00sealed", None, None, None, True)
    assert rows.one("SELECT outcome, error_class, error_frames FROM delivery_attempts") == (
        "failed",
        "E",
        ["m:1:f", "m:2:g"],
    )
    assert rows.one("SELECT state, ready_at > now() + interval '50 seconds', owner FROM lanes") == (
        "waiting",
        True,
        "w1",
    )


def test_a_death(rows: Rows) -> None:
    """A dead delivery is finished, and its lane stays ready."""
    [delivery] = rows.add()
    lease = rows.claim()
    outcomes.start(rows.connection, lease, delivery)
    assert outcomes.fail(rows.connection, lease, delivery, 1, failure(state="dead"))
    assert rows.one("SELECT state, finished_at IS NULL, ready_at FROM deliveries") == ("dead", False, None)
    assert rows.one("SELECT state FROM lanes") == ("ready",)


def test_a_deferral(rows: Rows) -> None:
    """A deferral does not count as an attempt, and keeps the time of the first one."""
    [delivery] = rows.add()
    lease = rows.claim()
    since = None
    for _ in range(2):
        assert outcomes.start(rows.connection, lease, delivery) == 1
        outcomes.fail(rows.connection, lease, delivery, 1, failure(outcome="retry_later", counted=False, deferred=True))
        attempts, deferred_since = rows.one("SELECT attempts, deferred_since FROM deliveries")
        assert attempts == 0
        assert since in (None, deferred_since)
        since = deferred_since
    rows.do("UPDATE deliveries SET deferred_since = now() - interval '1 hour'")
    assert 3590 < waiting_deliveries.batch(rows.connection, lease)[0].deferred_for < 3700


def test_a_failure_that_releases_the_lease(rows: Rows) -> None:
    """A failure recorded for a killed process ends its lease, so that a statement which the process sent earlier
    records nothing.
    """
    [delivery] = rows.add()
    lease = rows.claim()
    outcomes.start(rows.connection, lease, delivery)
    assert outcomes.fail(rows.connection, lease, delivery, 1, failure(outcome="timed_out", release=True))

    assert rows.one("SELECT owner, lease_until FROM lanes") == (None, None)
    assert outcomes.succeed(rows.other, lease, delivery, 1, following=None) == (False, None)


def test_recently_dead(rows: Rows) -> None:
    """Dead deliveries of the last ten minutes are counted by handler, destination and error class."""
    ids = rows.add(count=5)
    rows.do("UPDATE deliveries SET state = 'dead', error_class = 'E', finished_at = now()")
    rows.do("UPDATE deliveries SET error_class = 'F' WHERE id = :id", id=ids[0])
    rows.do("UPDATE deliveries SET finished_at = now() - interval '11 minutes' WHERE id = :id", id=ids[1])
    rows.do("UPDATE deliveries SET destination_id = 2 WHERE id = :id", id=ids[2])

    assert outcomes.recently_dead(rows.connection, "h", "lab", "E") == 2
    assert outcomes.recently_dead(rows.connection, "g", "lab", "E") == 0
