"""Wake-ups: which lanes need a worker, and the jobs that wake one."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from receiver.storage.queue import leases, wake_ups
from receiver.storage.queue.partitions import TABLES
from tests.storage.queue.rows import LANE, Rows, many


def due(rows: Rows, limit: int = 100) -> list[str]:
    """Return the lanes of the handler `h` that are due."""
    return wake_ups.due(rows.connection, ["h"], after="", limit=limit)[0]


def jobs(rows: Rows) -> list[str]:
    """Return the arguments of the waiting jobs."""
    return list(
        rows.connection.execute(
            text("SELECT args->>'lane' FROM procrastinate.procrastinate_jobs WHERE status = 'todo' ORDER BY id")
        ).scalars()
    )


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("SELECT 1", True),
        ("UPDATE subscriptions SET paused_at = now()", False),
        ("UPDATE deliveries SET state = 'dead'", False),
        ("UPDATE deliveries SET inline = true", False),
        ("UPDATE lanes SET state = 'held'", False),
        ("UPDATE lanes SET state = 'waiting', ready_at = now() + interval '1 hour'", False),
        ("UPDATE lanes SET state = 'waiting', ready_at = now()", True),
        ("UPDATE lanes SET owner = 'w', lease_until = now() + interval '1 hour'", False),
        ("UPDATE lanes SET owner = 'w', lease_until = now() - interval '1 second'", True),
        ("DELETE FROM lanes", True),
    ],
)
def test_due(rows: Rows, change: str, found: bool) -> None:
    """A lane is due if a delivery in it is pending that a worker may run now."""
    rows.add()
    rows.add("g/lab/source:s1")  # of a handler that is not asked for
    leases.release(rows.connection, rows.claim())
    rows.do(change)
    assert due(rows) == ([LANE] if found else [])


def test_due_unordered(rows: Rows) -> None:
    """An unordered lane is due if one of its deliveries is."""
    lane = "h/lab/any:1"
    one, _two = rows.add(lane, count=2)
    rows.do("UPDATE deliveries SET ready_at = now() + interval '1 hour'")
    assert due(rows) == []
    rows.do("UPDATE deliveries SET ready_at = now() WHERE id = :id", id=one)
    assert due(rows) == [lane]
    rows.do("UPDATE deliveries SET ready_at = NULL WHERE id = :id", id=one)
    assert due(rows) == [lane]


def test_one_job_for_a_lane(rows: Rows) -> None:
    """A lane with a waiting or running job is not due, and a second `defer` creates no second job."""
    rows.add()
    for _ in range(2):
        wake_ups.defer(rows.connection, LANE)
    job = "SELECT queue_name, task_name, lock, queueing_lock, args, status::text FROM procrastinate.procrastinate_jobs"
    assert rows.one(job) == ("h", "lane", LANE, LANE, {"lane": LANE}, "todo")
    assert due(rows) == []
    rows.take_jobs()
    assert due(rows) == []
    wake_ups.defer(rows.connection, LANE)  # something new came while it runs
    assert rows.one("SELECT count(*) FROM procrastinate.procrastinate_jobs") == (2,)
    assert rows.one("SELECT current_setting('search_path') NOT LIKE '%procrastinate%'") == (True,)


def test_others_wait(rows: Rows) -> None:
    """`others_wait` counts a waiting job, unless another job of its lane is running."""
    assert not wake_ups.others_wait(rows.connection, ["h"])
    wake_ups.defer(rows.connection, LANE)
    assert wake_ups.others_wait(rows.connection, ["h"])
    assert not wake_ups.others_wait(rows.connection, ["g"])
    rows.take_jobs()
    wake_ups.defer(rows.connection, LANE)
    assert not wake_ups.others_wait(rows.connection, ["h"])


def test_scan_in_parts(rows: Rows) -> None:
    """A scan continues after the last lane of the one before, and starts again at the end."""
    names = [f"h/lab/source:{number:02}" for number in range(7)]
    for name in names:
        rows.add(name)
    found, after = [], ""
    for _ in range(3):
        some, after = wake_ups.due(rows.connection, ["h"], after=after, limit=3)
        found.append(some)
    assert (found, after) == ([names[:3], names[3:6], names[6:]], "")


def test_the_scan_skips_a_backlog(rows: Rows) -> None:
    """The scan goes from lane to lane: it does not read 100,000 pending deliveries of a lane that waits, ordered or
    unordered.
    """
    for lane in (LANE, "h/lab/any:1"):
        rows.do(
            "INSERT INTO deliveries (message_id, received_at, destination_id, handler, lane, inline, ready_at, "
            "generation) SELECT 1, now(), 1, 'h', :lane, false, now() + interval '1 hour', "
            "g + hashtext(:lane) % 1000 * 200000 FROM generate_series(1, 100000) g",
            lane=lane,
        )
    leases.release(rows.connection, rows.claim())
    rows.do("UPDATE lanes SET state = 'waiting', ready_at = now() + interval '1 hour'")
    rows.do("VACUUM ANALYZE deliveries")
    rows.add("h/lab/source:s2")

    plan = "\n".join(
        rows.connection.exec_driver_sql(
            f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, BUFFERS) {wake_ups._DUE}",
            {"handlers": ["h"], "after": "", "limit": 500},
        ).scalars()
    )
    assert due(rows) == ["h/lab/source:s2"]
    buffers = next(line for line in plan.splitlines() if "Buffers:" in line)
    read = sum(int(part.partition("=")[2]) for part in buffers.split() if part.startswith(("hit=", "read=")))
    assert 0 < read < 500, plan
    table = TABLES["deliveries"]
    full = f"Seq Scan on {table.partition(table.start(datetime.now(UTC)))} "  # the others are empty
    assert not [line for line in plan.splitlines() if full in line and "never executed" not in line]


def test_one_job_for_many(rows: Rows) -> None:
    """A few lanes have a job each.

    Many lanes of one handler share one job, but an unordered lane always has its own.
    """
    few = many(rows, wake_ups.MAX_JOBS)
    for _ in range(2):
        wake_ups.wake(rows.connection, few[:2])
    assert jobs(rows) == few[:2]
    for _ in range(2):
        wake_ups.wake(rows.connection, [*few, "h/lab/any:1", "g/lab/source:s1"])
    assert jobs(rows) == [*few[:2], "h/*", "h/lab/any:1", "g/lab/source:s1"]
    assert [wake_ups.many(each) for each in jobs(rows)[1:3]] == [None, "h"]
    assert wake_ups.others_wait(rows.connection, ["h"])


def test_shared_jobs_run_at_once(rows: Rows) -> None:
    """The shared job has no lock: several workers may run one each."""
    wake_ups.defer_many(rows.connection, "h")
    rows.take_jobs()
    wake_ups.defer_many(rows.connection, "h")
    rows.take_jobs()
    assert rows.one("SELECT count(*), count(lock) FROM procrastinate.procrastinate_jobs WHERE status = 'doing'") == (
        2,
        0,
    )


def test_defer_at_the_same_moment(rows: Rows, engine: Engine) -> None:
    """If two processes defer a job for a lane at the same moment, one job is created and neither gets an error.

    Other errors are raised.
    """
    rows.other.execution_options(isolation_level="READ COMMITTED")
    wake_ups.defer(rows.other, LANE)
    waking = threading.Thread(target=lambda: wake_ups.wake(rows.connection, [LANE]))
    waking.start()
    waking.join(0.3)
    rows.other.commit()
    waking.join(30)
    assert jobs(rows) == [LANE]
    with pytest.raises(SQLAlchemyError):
        wake_ups.wake(rows.connection, ["h\0/lab/source:s1"])
