"""Facts about claims, leases, epochs and outcomes, and about finding the lanes that wait: on a real PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import sqlstate
from receiver.storage.queue import lanes
from receiver.storage.queue.lanes import DeliveryFailure, Lease
from receiver.storage.registry.changes import HandlerSpec, RegistryChanges

LANE = "h/lab/source:s1"


@dataclass
class Rows:
    """Deliveries put in by hand, and two connections: two hosts."""

    connection: Connection
    other: Connection

    def add(self, lane: str = LANE, count: int = 1, *, inline: bool = False, size: int = 10) -> list[int]:
        """Messages with a delivery each; the deliveries' ids."""
        return list(
            self.connection.execute(
                text("""
            WITH m AS (INSERT INTO messages (uuid, destination_id, credential_ids, query, test, kind, received_at, peer,
                                             sha256, size, state, id_conflict, mac, mac_key)
                       SELECT gen_random_uuid(), 1, '{}', false, false, 'A.B', now(), 'p', '', :size, 'accepted', false,
                              '', '' FROM generate_series(1, :count) RETURNING id, received_at),
            p AS (INSERT INTO payloads (message_id, received_at, payload_key, sealed) SELECT id, received_at, 'k', 's'
                  FROM m)
            INSERT INTO deliveries (message_id, destination_id, handler, lane, inline)
            SELECT id, 1, split_part(:lane, '/', 1), :lane, :inline FROM m ORDER BY id RETURNING id"""),
                {"lane": lane, "count": count, "inline": inline, "size": size},
            ).scalars()
        )

    def one(self, query: str, **values: Any) -> Any:
        """The only row."""
        return self.connection.execute(text(query), values).one()

    def do(self, statement: str, **values: Any) -> None:
        """Change something."""
        self.connection.execute(text(statement), values)

    def take_jobs(self) -> None:
        """What Procrastinate does when it takes its jobs; its triggers want its names on the path."""
        self.do("SET search_path TO procrastinate, public")
        self.do("UPDATE procrastinate_jobs SET status = 'doing'")
        self.do("RESET search_path")

    def claim(self, lane: str = LANE, owner: str = "w1", **more: Any) -> Lease:
        """A claim that succeeds."""
        fence = lanes.claim(self.connection, lane, owner, 60, **more)
        assert fence is not None
        return fence


@pytest.fixture
def rows(engine: Engine, registration: RegistryChanges) -> Iterator[Rows]:
    """Handler `h` at destination `lab`."""
    registration.add_destination(
        "lab",
        datetime.now(UTC),
        environment="staging",
        require=["token"],
        sources_policy="any",
        reply_with=None,
        on_unknown_source="reject",
        test_messages="accept",
        token="a token of twenty-four characters",
    )
    registration.enable_handler(
        "lab",
        HandlerSpec(
            handler="h",
            role="handler",
            patterns=("*",),
            ordering="source",
            patient_key=None,
            acknowledge="after_commit",
            on_failure="dead",
            max_attempts=3,
            timeout=1,
        ),
        datetime.now(UTC),
    )
    with engine.connect() as one, engine.connect() as two:
        yield Rows(
            one.execution_options(isolation_level="AUTOCOMMIT"), two.execution_options(isolation_level="AUTOCOMMIT")
        )


def failure(**more: Any) -> DeliveryFailure:
    return DeliveryFailure(**{"outcome": "failed", "state": "pending", "error_class": "E", **more})


# --- claims


def test_a_claim(rows: Rows) -> None:
    """A lane is one owner's at a time; each claim has a higher epoch than the one before."""
    rows.add()
    first = rows.claim(owner="w1")
    assert lanes.claim(rows.other, LANE, "w2", 60) is None
    lanes.release(rows.connection, first)
    second = rows.claim(owner="w2")

    assert (first.epoch, second.epoch) == (1, 2)
    lanes.release(rows.connection, first)  # no longer its own
    assert rows.one("SELECT owner, epoch FROM lanes") == ("w2", 2)


def test_a_lease_that_is_over(rows: Rows) -> None:
    """A lane whose lease is over is taken over, and its late owner renews and releases nothing."""
    rows.add()
    late = rows.claim(owner="w1")
    rows.do("UPDATE lanes SET lease_until = now() - interval '1 second'")
    fence = lanes.claim(rows.other, LANE, "w2", 60)

    assert fence == Lease(lane=LANE, epoch=2, owner="w2")
    assert lanes.renew(rows.connection, "w1", {LANE: late.epoch}, 60) == set()
    assert not lanes.renew_one(rows.connection, late, 60)


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
def test_what_is_to_be_had(rows: Rows, change: str, had: bool) -> None:
    """A lane is not to be had while its handler is paused or not enabled, while it is held or waits, or when nothing is
    pending in it. A disabled destination takes in nothing more; what it took in runs."""
    rows.add()
    lanes.release(rows.connection, rows.claim())
    rows.do(change)

    assert (lanes.claim(rows.connection, LANE, "w", 60) is not None) == had


def test_a_claim_makes_a_waiting_lane_ready(rows: Rows) -> None:
    """A lane whose time has come is ready once it is claimed."""
    rows.add()
    lanes.release(rows.connection, rows.claim())
    rows.do("UPDATE lanes SET state = 'waiting', ready_at = now()")
    rows.claim()
    assert rows.one("SELECT state, ready_at FROM lanes") == ("ready", None)


def test_inline_lanes(rows: Rows) -> None:
    """What is to be run within requests is claimed by requests alone."""
    rows.add(inline=True)
    assert lanes.claim(rows.connection, LANE, "w", 60) is None
    assert lanes.claim(rows.connection, LANE, "r", 60, inline=True) is not None


def test_many_claim_one_lane(rows: Rows, engine: Engine) -> None:
    """Of many that claim a lane at the same moment one has it."""
    rows.add()
    claims: list[Lease | None] = []
    start = threading.Barrier(4)

    def claim(owner: str) -> None:
        with engine.connect() as connection:
            start.wait(30)
            claims.append(lanes.claim(connection.execution_options(isolation_level="AUTOCOMMIT"), LANE, owner, 60))

    threads = [threading.Thread(target=claim, args=(f"w{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    start.wait(30)
    for thread in threads:
        thread.join(30)
    assert sorted(each is None for each in claims) == [False, True, True]


def test_renewing(rows: Rows) -> None:
    """Leases are prolonged together; one that is locked by an outcome's commit is waited for by itself."""
    rows.add()
    rows.add("h/lab/source:s2")
    one, two = rows.claim(), rows.claim("h/lab/source:s2")
    rows.do("UPDATE lanes SET lease_until = now() + interval '1 second'")
    rows.other.execution_options(isolation_level="READ COMMITTED")
    rows.other.execute(text("SELECT FROM lanes WHERE lane = :lane FOR NO KEY UPDATE"), {"lane": LANE})
    held = {one.lane: one.epoch, two.lane: two.epoch}

    assert lanes.renew(rows.connection, "w1", held, 60) == {two.lane}
    with pytest.raises(SQLAlchemyError) as caught:
        lanes.renew_one(rows.connection, one, 60)
    assert sqlstate(caught.value) == "55P03"  # it did not wait for ever
    rows.other.rollback()
    assert lanes.renew_one(rows.connection, one, 60)
    assert rows.one("SELECT min(lease_until) > now() + interval '50 seconds' FROM lanes") == (True,)


# --- reading


def test_a_batch(rows: Rows) -> None:
    """Deliveries come oldest first, with their payloads; neither more than fit in a batch nor what is inline."""
    ids = rows.add(count=lanes.BATCH_ROWS + 5)
    rows.add(inline=True)
    fence = rows.claim()
    first = lanes.batch(rows.connection, fence)

    assert [each.id for each in first] == ids[: lanes.BATCH_ROWS]
    assert (first[0].attempts, first[0].lost, first[0].deferred_for, first[0].sealed) == (0, False, 0.0, b"s")
    assert [each.id for each in lanes.batch(rows.connection, fence, after=first[-1].id)] == ids[lanes.BATCH_ROWS :]
    assert lanes.batch(rows.connection, fence, after=ids[-1]) == []


def test_a_batch_of_large_ones(rows: Rows) -> None:
    """Large payloads are read one by one; one that is larger than a batch may be is read all the same."""
    ids = rows.add(count=3, size=lanes.BATCH_BYTES * 3 // 4) + rows.add(size=10 * lanes.BATCH_BYTES)
    fence = rows.claim()

    assert [each.id for each in lanes.batch(rows.connection, fence)] == ids[:2]
    assert [each.id for each in lanes.batch(rows.connection, fence, after=ids[2])] == ids[3:]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE lanes SET epoch = epoch + 1",
        "UPDATE lanes SET owner = NULL",
        "UPDATE subscriptions SET paused_at = now()",
    ],
)
def test_nothing_to_read(rows: Rows, change: str) -> None:
    """Whoever has lost the lane, or whose handler is paused, reads and starts nothing."""
    [delivery] = rows.add()
    fence = rows.claim()
    rows.do(change)

    assert lanes.batch(rows.connection, fence) == []
    assert lanes.start(rows.connection, fence, delivery) is None
    assert rows.one("SELECT attempts FROM deliveries") == (0,)


def test_a_batch_within_a_request(rows: Rows) -> None:
    """Within a request only what is inline is read, up to the delivery that it is about."""
    ids = rows.add(count=3, inline=True)
    rows.add()
    fence = rows.claim(inline=True)
    assert [each.id for each in lanes.batch(rows.connection, fence, inline=True, up_to=ids[1])] == ids[:2]


def test_a_batch_without_order(rows: Rows) -> None:
    """In a lane without order what waits for its time is left out; what has waited comes first."""
    lane = "h/lab/any:3"
    ids = rows.add(lane, count=4)
    rows.do("UPDATE deliveries SET ready_at = now() + interval '1 hour' WHERE id = :id", id=ids[0])
    rows.do("UPDATE deliveries SET ready_at = now() WHERE id = :id", id=ids[2])
    fence = rows.claim(lane)

    assert [each.id for each in lanes.batch(rows.connection, fence, unordered=True)] == [ids[2], ids[1], ids[3]]
    assert [each.id for each in lanes.batch(rows.connection, fence, unordered=True, after=ids[1])] == [ids[2], ids[3]]


# --- outcomes


def test_success_starts_the_next(rows: Rows) -> None:
    """One statement records a success and starts what follows."""
    first, second = rows.add(count=2)
    fence = rows.claim()
    assert lanes.start(rows.connection, fence, first) == 1
    assert rows.one("SELECT epoch, started_at IS NULL FROM deliveries WHERE id = :id", id=first) == (1, False)

    assert lanes.succeed(rows.connection, fence, first, 1, following=second) == (True, 1)
    assert lanes.succeed(rows.connection, fence, second, 1, following=None) == (True, None)
    assert rows.connection.execute(
        text("SELECT delivery_id, attempt, epoch, worker, outcome FROM delivery_attempts ORDER BY id")
    ).all() == [(first, 1, 1, "w1", "succeeded"), (second, 1, 1, "w1", "succeeded")]


def test_success_where_the_next_was_skipped(rows: Rows) -> None:
    """What follows and is no longer pending is not started; the success stands."""
    first, second = rows.add(count=2)
    fence = rows.claim()
    lanes.start(rows.connection, fence, first)
    rows.do("UPDATE deliveries SET state = 'skipped' WHERE id = :id", id=second)
    assert lanes.succeed(rows.connection, fence, first, 1, following=second) == (True, None)


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
    """Where the lease is not its own any more, or somebody has dealt with the delivery, a run records nothing."""
    first, second = rows.add(count=2)
    fence = rows.claim()
    lanes.start(rows.connection, fence, first)
    rows.do(change)
    before = rows.connection.execute(text("SELECT * FROM deliveries ORDER BY id")).all()

    assert lanes.succeed(rows.connection, fence, first, 1, following=second) == (False, None)
    assert not lanes.fail(rows.connection, fence, first, 1, failure())
    assert rows.connection.execute(text("SELECT * FROM deliveries ORDER BY id")).all() == before
    assert rows.one("SELECT count(*) FROM delivery_attempts") == (0,)


def test_a_takeover_waits_for_a_commit(rows: Rows) -> None:
    """A success that is about to commit keeps its lane until it has: whoever takes over sees it."""
    [delivery] = rows.add()
    fence = rows.claim()
    lanes.start(rows.connection, fence, delivery)
    rows.do("UPDATE lanes SET lease_until = now() - interval '1 second'")
    rows.other.execution_options(isolation_level="READ COMMITTED")
    assert lanes.succeed(rows.other, fence, delivery, 1, following=None) == (True, None)
    taken: list[Lease | None] = []
    taking = threading.Thread(target=lambda: taken.append(lanes.claim(rows.connection, LANE, "w2", 60)))
    taking.start()
    taking.join(0.3)
    assert taken == []
    rows.other.commit()
    taking.join(30)

    assert rows.one("SELECT state FROM deliveries") == ("succeeded",)
    assert taken in ([Lease(lane=LANE, epoch=2, owner="w2")], [None])


def test_a_takeover_before_a_commit(rows: Rows) -> None:
    """A success that comes while another takes over waits for that, and is refused."""
    [delivery] = rows.add()
    fence = rows.claim()
    lanes.start(rows.connection, fence, delivery)
    rows.do("UPDATE lanes SET lease_until = now() - interval '1 second'")
    rows.other.execution_options(isolation_level="READ COMMITTED")
    assert lanes.claim(rows.other, LANE, "w2", 60) is not None
    recorded: list[Any] = []
    recording = threading.Thread(
        target=lambda: recorded.append(lanes.succeed(rows.connection, fence, delivery, 1, following=None))
    )
    recording.start()
    recording.join(0.3)
    assert recorded == []
    rows.other.commit()
    recording.join(30)
    assert recorded == [(False, None)]


def test_a_failure(rows: Rows) -> None:
    """A failure tells of the error, and has the delivery and its lane wait."""
    [delivery] = rows.add()
    fence = rows.claim()
    lanes.start(rows.connection, fence, delivery)
    assert lanes.fail(
        rows.connection,
        fence,
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
    fence = rows.claim()
    lanes.start(rows.connection, fence, delivery)
    assert lanes.fail(rows.connection, fence, delivery, 1, failure(state="dead"))
    assert rows.one("SELECT state, finished_at IS NULL, ready_at FROM deliveries") == ("dead", False, None)
    assert rows.one("SELECT state FROM lanes") == ("ready",)


def test_a_deferral(rows: Rows) -> None:
    """A deferral gives the attempt back and keeps the time of the first one."""
    [delivery] = rows.add()
    fence = rows.claim()
    since = None
    for _ in range(2):
        assert lanes.start(rows.connection, fence, delivery) == 1
        lanes.fail(rows.connection, fence, delivery, 1, failure(outcome="retry_later", counted=False, deferred=True))
        attempts, deferred_since = rows.one("SELECT attempts, deferred_since FROM deliveries")
        assert attempts == 0
        assert since in (None, deferred_since)
        since = deferred_since
    rows.do("UPDATE deliveries SET deferred_since = now() - interval '1 hour'")
    assert 3590 < lanes.batch(rows.connection, fence)[0].deferred_for < 3700


def test_nothing_comes_after_the_end(rows: Rows) -> None:
    """A failure that is recorded for a process that was killed ends its lease, so that nothing which the process had
    sent before can be recorded after."""
    [delivery] = rows.add()
    fence = rows.claim()
    lanes.start(rows.connection, fence, delivery)
    assert lanes.fail(rows.connection, fence, delivery, 1, failure(outcome="timed_out", release=True))

    assert rows.one("SELECT owner, lease_until FROM lanes") == (None, None)
    assert lanes.succeed(rows.other, fence, delivery, 1, following=None) == (False, None)


def test_recently_dead(rows: Rows) -> None:
    """Deaths are counted by handler, destination and error class, and for ten minutes."""
    ids = rows.add(count=5)
    rows.do("UPDATE deliveries SET state = 'dead', error_class = 'E', finished_at = now()")
    rows.do("UPDATE deliveries SET error_class = 'F' WHERE id = :id", id=ids[0])
    rows.do("UPDATE deliveries SET finished_at = now() - interval '11 minutes' WHERE id = :id", id=ids[1])
    rows.do("UPDATE deliveries SET destination_id = 2 WHERE id = :id", id=ids[2])

    assert lanes.recently_dead(rows.connection, "h", "lab", "E") == 2
    assert lanes.recently_dead(rows.connection, "g", "lab", "E") == 0


# --- lanes that wait for a worker


def due(rows: Rows, limit: int = 100) -> list[str]:
    return lanes.due(rows.connection, ["h"], after="", limit=limit)[0]


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
def test_what_is_due(rows: Rows, change: str, found: bool) -> None:
    """A lane is due when something in it is pending that a worker may run now."""
    rows.add()
    rows.add("g/lab/source:s1")  # of a handler that is not asked for
    lanes.release(rows.connection, rows.claim())
    rows.do(change)
    assert due(rows) == ([LANE] if found else [])


def test_due_without_order(rows: Rows) -> None:
    """A lane without order is due when one of its deliveries is."""
    lane = "h/lab/any:1"
    one, _two = rows.add(lane, count=2)
    rows.do("UPDATE deliveries SET ready_at = now() + interval '1 hour'")
    assert due(rows) == []
    rows.do("UPDATE deliveries SET ready_at = now() WHERE id = :id", id=one)
    assert due(rows) == [lane]
    rows.do("UPDATE deliveries SET ready_at = NULL WHERE id = :id", id=one)
    assert due(rows) == [lane]


def test_one_job_for_a_lane(rows: Rows) -> None:
    """A lane for which a job waits or runs is not due; telling twice makes one job."""
    rows.add()
    for _ in range(2):
        lanes.defer(rows.connection, LANE)
    job = "SELECT queue_name, task_name, lock, queueing_lock, args, status::text FROM procrastinate.procrastinate_jobs"
    assert rows.one(job) == ("h", "lane", LANE, LANE, {"lane": LANE}, "todo")
    assert due(rows) == []
    rows.take_jobs()
    assert due(rows) == []
    lanes.defer(rows.connection, LANE)  # something new came while it runs
    assert rows.one("SELECT count(*) FROM procrastinate.procrastinate_jobs") == (2,)
    assert rows.one("SELECT current_setting('search_path') NOT LIKE '%procrastinate%'") == (True,)


def test_others_wait(rows: Rows) -> None:
    """Others wait where a lane's job is to be done and could be: not one whose lane runs already."""
    assert not lanes.others_wait(rows.connection, ["h"])
    lanes.defer(rows.connection, LANE)
    assert lanes.others_wait(rows.connection, ["h"])
    assert not lanes.others_wait(rows.connection, ["g"])
    rows.take_jobs()
    lanes.defer(rows.connection, LANE)
    assert not lanes.others_wait(rows.connection, ["h"])


def test_a_part_at_a_time(rows: Rows) -> None:
    """The search goes on where it stopped, so that many lanes are looked at a part at a time, and begins anew."""
    names = [f"h/lab/source:{number:02}" for number in range(7)]
    for name in names:
        rows.add(name)
    found, after = [], ""
    for _ in range(3):
        some, after = lanes.due(rows.connection, ["h"], after=after, limit=3)
        found.append(some)
    assert (found, after) == ([names[:3], names[3:6], names[6:]], "")


def test_a_backlog_costs_nothing(rows: Rows) -> None:
    """The search steps from lane to lane: 100,000 pending in a lane that waits, ordered or not, are not read."""
    for lane in (LANE, "h/lab/any:1"):
        rows.do(
            "INSERT INTO deliveries (message_id, destination_id, handler, lane, inline, ready_at, generation) "
            "SELECT 1, 1, 'h', :lane, false, now() + interval '1 hour', g + hashtext(:lane) % 1000 * 200000 "
            "FROM generate_series(1, 100000) g",
            lane=lane,
        )
    lanes.release(rows.connection, rows.claim())
    rows.do("UPDATE lanes SET state = 'waiting', ready_at = now() + interval '1 hour'")
    rows.do("VACUUM ANALYZE deliveries")
    rows.add("h/lab/source:s2")

    plan = "\n".join(
        rows.connection.exec_driver_sql(
            f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, BUFFERS) {lanes._DUE}",
            {"handlers": ["h"], "after": "", "limit": 500},
        ).scalars()
    )
    assert due(rows) == ["h/lab/source:s2"]
    buffers = next(line for line in plan.splitlines() if "Buffers:" in line)
    read = sum(int(part.partition("=")[2]) for part in buffers.split() if part.startswith(("hit=", "read=")))
    assert 0 < read < 500, plan
    assert not [line for line in plan.splitlines() if "Seq Scan on deliveries" in line and "never executed" not in line]


# --- within a request


def test_an_inline_delivery(rows: Rows) -> None:
    """A request sees of its delivery whether it is still its own to run."""
    [delivery] = rows.add(inline=True)
    [other] = rows.add("h/lab/source:s2")
    assert lanes.inline_delivery(rows.connection, delivery) == (LANE, True)
    assert lanes.inline_delivery(rows.connection, other) is None
    rows.do("UPDATE deliveries SET state = 'succeeded' WHERE id = :id", id=delivery)
    assert lanes.inline_delivery(rows.connection, delivery) == (LANE, False)


def test_handed_to_workers(rows: Rows) -> None:
    """What is pending within requests can be handed to workers; what they have before a delivery is seen."""
    first, second = rows.add(count=2, inline=True)
    assert not lanes.workers_first(rows.connection, LANE, second)
    lanes.hand_to_workers(rows.connection, LANE)
    assert lanes.workers_first(rows.connection, LANE, second)
    assert not lanes.workers_first(rows.connection, LANE, first)
    assert lanes.inline_delivery(rows.connection, second) is None


# --- many lanes


def many(rows: Rows, count: int, each: int = 1) -> list[str]:
    """So many lanes with something pending."""
    names = [f"h/lab/source:{number:03}" for number in range(count)]
    for name in names:
        rows.add(name, each)
    return names


def test_some_are_claimed(rows: Rows) -> None:
    """Of some lanes those are had that are to be had: new ones and free ones, not another's, nor one that is held, nor
    an empty one, nor one with nothing but what runs in requests; and all in the order of their names."""
    names = many(rows, 5)
    lanes.release(rows.connection, rows.claim(names[1]))
    rows.claim(names[2], owner="w2")
    lanes.release(rows.connection, rows.claim(names[3]))
    rows.do("UPDATE lanes SET state = 'held' WHERE lane = :lane", lane=names[3])
    rows.add("h/lab/source:900", inline=True)

    had = lanes.claim_some(rows.connection, [*reversed(names), "h/lab/source:900", "h/lab/source:nothing"], "w1", 60)
    assert had == [
        Lease(lane=names[0], epoch=1, owner="w1"),
        Lease(lane=names[1], epoch=2, owner="w1"),
        Lease(lane=names[4], epoch=1, owner="w1"),
    ]
    assert rows.one(
        "SELECT count(*) FROM lanes WHERE owner = 'w1' AND handler = 'h' AND destination_id = 1 "
        "AND lease_until > now() + interval '50 seconds'"
    ) == (3,)
    assert lanes.claim_some(rows.other, names, "w3", 60) == []
    lanes.release(rows.connection, *had)
    assert rows.one("SELECT count(*) FROM lanes WHERE owner = 'w1'") == (0,)
    rows.do("UPDATE subscriptions SET paused_at = now()")
    assert lanes.claim_some(rows.other, names, "w3", 60) == []


def test_some_wait_for_nobody(rows: Rows) -> None:
    """A lane that another is just about to record something in is left out, not waited for."""
    names = many(rows, 2)
    for name in names:
        lanes.release(rows.connection, rows.claim(name))
    rows.other.execution_options(isolation_level="READ COMMITTED")
    rows.other.execute(text("SELECT FROM lanes WHERE lane = :lane FOR NO KEY UPDATE"), {"lane": names[0]})
    assert [fence.lane for fence in lanes.claim_some(rows.connection, names, "w1", 60)] == names[1:]
    rows.other.rollback()


def test_heads(rows: Rows) -> None:
    """The first few of each lane are read at once, with their payloads; nothing of a lane that was lost."""
    names = many(rows, 3, lanes.HEADS + 1)
    fences = lanes.claim_some(rows.connection, names, "w1", 60)
    rows.do("UPDATE lanes SET epoch = epoch + 1 WHERE lane = :lane", lane=names[1])
    read = lanes.heads(rows.connection, fences)

    assert [len(each) for each in read] == [lanes.HEADS, 0, lanes.HEADS]
    assert read[2] == lanes.batch(rows.connection, fences[2])[: lanes.HEADS]
    rows.do("UPDATE messages SET size = :size", size=lanes.BATCH_BYTES)
    assert [len(each) for each in lanes.heads(rows.connection, fences)] == [1, 0, 0]
    rows.do("UPDATE subscriptions SET paused_at = now()")
    assert lanes.heads(rows.connection, fences) == [[], [], []]


@pytest.mark.parametrize(
    ("change", "started"),
    [
        ("SELECT 1", 1),
        ("UPDATE lanes SET epoch = 9 WHERE lane LIKE '%001'", None),
        ("UPDATE lanes SET owner = NULL WHERE lane LIKE '%001'", None),
    ],
)
def test_success_starts_the_next_lane_s(rows: Rows, change: str, started: int | None) -> None:
    """A success starts what is next in another lane of the same owner, where that is still its own; the success stands
    in any case."""
    first, second = lanes.claim_some(rows.connection, many(rows, 2), "w1", 60)
    one, two = (lanes.batch(rows.connection, fence)[0].id for fence in (first, second))
    lanes.start(rows.connection, first, one)
    rows.do(change)

    assert lanes.succeed(rows.connection, first, one, 1, following=two, next_lease=second) == (True, started)
    assert rows.one("SELECT state, epoch FROM deliveries WHERE id = :id", id=one) == ("succeeded", 1)
    assert rows.one("SELECT attempts, epoch FROM deliveries WHERE id = :id", id=two) == (started or 0, started)


def jobs(rows: Rows) -> list[str]:
    """What the jobs that wait stand for."""
    return list(
        rows.connection.execute(
            text("SELECT args->>'lane' FROM procrastinate.procrastinate_jobs WHERE status = 'todo' ORDER BY id")
        ).scalars()
    )


def test_one_job_for_many(rows: Rows) -> None:
    """A few lanes have a job each; for many of one handler there is one, which tells of the handler; a lane without
    order always has its own. Telling twice makes no more."""
    few = many(rows, lanes.MAX_JOBS)
    for _ in range(2):
        lanes.wake(rows.connection, few[:2])
    assert jobs(rows) == few[:2]
    for _ in range(2):
        lanes.wake(rows.connection, [*few, "h/lab/any:1", "g/lab/source:s1"])
    assert jobs(rows) == [*few[:2], "h/*", "h/lab/any:1", "g/lab/source:s1"]
    assert [lanes.many(each) for each in jobs(rows)[1:3]] == [None, "h"]
    assert lanes.others_wait(rows.connection, ["h"])


def test_many_jobs_at_once(rows: Rows) -> None:
    """The job for many has no lock: while one worker is at it another may take the next."""
    lanes.defer_many(rows.connection, "h")
    rows.take_jobs()
    lanes.defer_many(rows.connection, "h")
    rows.take_jobs()
    assert rows.one("SELECT count(*), count(lock) FROM procrastinate.procrastinate_jobs WHERE status = 'doing'") == (
        2,
        0,
    )


def test_told_at_the_same_moment(rows: Rows, engine: Engine) -> None:
    """Where two tell of a lane at the same moment one job is made, and neither is told of an error."""
    rows.other.execution_options(isolation_level="READ COMMITTED")
    lanes.defer(rows.other, LANE)
    waking = threading.Thread(target=lambda: lanes.wake(rows.connection, [LANE]))
    waking.start()
    waking.join(0.3)
    rows.other.commit()
    waking.join(30)
    assert jobs(rows) == [LANE]
    with pytest.raises(SQLAlchemyError):
        lanes.wake(rows.connection, ["h\0/lab/source:s1"])
