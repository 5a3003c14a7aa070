"""Many small lanes: several are run together, each in its own order; a failure stays in its lane."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from receiver.storage.queue import leases, waiting_deliveries
from receiver.worker import lane_scheduler
from receiver.worker.handler_process.ipc import LaneDone
from receiver.worker.handler_process.supervisor import HandlerSlot
from receiver.worker.lane_run import run_lanes
from receiver.worker.lane_scheduler import LaneScheduler
from receiver.worker.leases import Leases
from tests.support.waiting import until
from tests.worker.world import Sent, World, handler_processes


def stay(
    world: World, slot: HandlerSlot, names: Sequence[str], *, leave_after: float = 30.0, called: list[str] | None = None
) -> LaneDone | None:
    """Run some lanes as a worker does. `called`: whether other slots were notified."""
    handler, destination, _ = names[0].split("/", 2)
    subscription = next(each for each in world.destination(destination).subscriptions if each.handler == handler)
    return run_lanes(
        slot,
        Leases(world.engine, "tester"),
        names,
        subscription,
        lease=30,
        leave_after=leave_after,
        others=lambda: (called if called is not None else []).append(handler),
    )


def hand(world: World, place: str, *deeds: Sequence[str]) -> list[Sent]:
    """Create a lane for each of the sequences of actions."""
    return [world.hand(*each, destination=place, source=f"s{number}") for number, each in enumerate(deeds)]


def left(world: World, sent: Sequence[Sent]) -> int:
    """Return how many of the lanes have an owner."""
    return len(
        world.rows(
            "SELECT FROM lanes WHERE owner IS NOT NULL AND lane = ANY(:lanes)", lanes=[each.lane for each in sent]
        )
    )


def test_one_stay_in_many(shared: World, warm: HandlerSlot, place: str) -> None:
    """Several lanes are run together, each in its own order and each delivery once.

    Only the first few of a long lane run, and all lanes are released.
    """
    shared.enable("scripted", place)
    sent = hand(shared, place, *[["nothing"] * 2] * 6, ["nothing"] * (waiting_deliveries.HEADS + 3))

    assert stay(shared, warm, [each.lane for each in sent]) == LaneDone(why="empty")
    assert [each.ran() for each in sent] == [[1, 2]] * 6 + [list(range(1, waiting_deliveries.HEADS + 1))]
    assert [each.states() for each in sent[:6]] == [["succeeded"] * 2] * 6
    assert [each["attempts"] for each in sent[6].deliveries()] == [1] * waiting_deliveries.HEADS + [0] * 3
    assert len({line["pid"] for each in sent for line in each.journal("begin")}) == 1
    assert left(shared, sent) == 0
    assert stay(shared, warm, [each.lane for each in sent]) == LaneDone(why="empty")
    assert sent[6].ran() == list(range(1, waiting_deliveries.HEADS + 4))
    assert stay(shared, warm, [each.lane for each in sent]) is None


def test_a_failure_in_one_of_many(shared: World, warm: HandlerSlot, place: str) -> None:
    """A lane that waits blocks no other; the work of each delivery commits with its own success."""
    shared.execute("CREATE TABLE IF NOT EXISTS effects (n integer, attempt integer)")
    shared.enable("scripted", place)
    sent = hand(
        shared, place, ["insert", "insert_raise", "insert"], ["insert"], ["retry_later:60", "nothing"], ["insert"]
    )

    assert stay(shared, warm, [each.lane for each in sent]) == LaneDone(why="empty")
    assert [each.states() for each in sent] == [
        ["succeeded", "pending", "pending"],
        ["succeeded"],
        ["pending", "pending"],
        ["succeeded"],
    ]
    assert [each.outcomes() for each in sent] == [
        ["succeeded", "failed"],
        ["succeeded"],
        ["retry_later"],
        ["succeeded"],
    ]
    numbers = [number for each in sent for number in each.numbers]
    done = shared.rows("SELECT n FROM effects WHERE n = ANY(:n) ORDER BY n", n=numbers)
    assert [row["n"] for row in done] == [sent[0].first, sent[1].first, sent[3].first]
    assert left(shared, sent) == 0


def test_the_dead_in_many(shared: World, warm: HandlerSlot, place: str) -> None:
    """After a dead delivery the run ends, so that the handler can be paused; the other lanes are released."""
    shared.enable("fragile", place)
    sent = hand(shared, place, ["nothing"], ["raise", "nothing"], ["nothing"])

    assert stay(shared, warm, [each.lane for each in sent]) == LaneDone(why="dead", error_class="ValueError")
    assert [each.states() for each in sent] == [["succeeded"], ["dead", "pending"], ["pending"]]
    assert sent[2].deliveries()[0]["attempts"] == 0
    assert left(shared, sent) == 0


def test_a_crash_in_many(shared: World, warm: HandlerSlot, place: str) -> None:
    """A crash counts only against the delivery that was running; earlier successes stand."""
    shared.enable("fragile", place)
    sent = hand(shared, place, ["nothing"], ["exit", "nothing"], ["nothing"])

    assert stay(shared, warm, [each.lane for each in sent]) == LaneDone(why="dead", error_class="Exit3")
    assert [each.states() for each in sent] == [["succeeded"], ["dead", "pending"], ["pending"]]
    assert [each.outcomes() for each in sent] == [["succeeded"], ["crashed"], []]
    assert left(shared, sent) == 0
    stay(shared, warm, [each.lane for each in sent])
    assert [each.states() for each in sent] == [["succeeded"], ["dead", "succeeded"], ["succeeded"]]


def test_a_lost_attempt_in_many(shared: World, warm: HandlerSlot, place: str) -> None:
    """An attempt without an end counts in its lane only."""
    shared.enable("scripted", place)
    sent = hand(shared, place, ["nothing"], ["nothing"], ["nothing"])
    shared.execute("UPDATE deliveries SET attempts = 1, started_at = now() WHERE lane = :lane", lane=sent[1].lane)

    assert stay(shared, warm, [each.lane for each in sent]) == LaneDone(why="empty")
    assert [each.outcomes() for each in sent] == [["succeeded"], ["crashed", "succeeded"], ["succeeded"]]
    assert [each.deliveries()[0]["attempts"] for each in sent] == [1, 2, 1]


def test_slow_ones_keep_nobody_waiting(shared: World, warm: HandlerSlot, place: str) -> None:
    """While a handler is slow, the later lanes are released for other slots.

    The run does not start them any more, and its current delivery is recorded.
    """
    shared.enable("patient-one", place)
    flag = shared.flag(f"go-{place}")
    sent = hand(shared, place, ["nothing"], [f"wait_for:{flag}", "nothing"], ["nothing"], ["nothing"])
    called: list[str] = []
    result: list[LaneDone | None] = []
    staying = threading.Thread(
        target=lambda: result.append(stay(shared, warm, [each.lane for each in sent], called=called))
    )
    staying.start()
    until(lambda: called, "others were called")
    assert left(shared, sent) == 2  # what is run, and what was before
    with shared.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        assert leases.claim(connection, sent[2].lane, "another", 60) is not None
    flag.touch()
    staying.join(60)

    assert result == [LaneDone(why="empty")]
    assert [each.ran() for each in sent] == [[1], [1, 2], [], []]
    assert called == ["patient-one"]
    assert shared.rows("SELECT owner FROM lanes WHERE lane = :lane", lane=sent[2].lane) == [{"owner": "another"}]


def test_time_in_many(shared: World, warm: HandlerSlot, place: str) -> None:
    """When the time is over, the run ends after the current delivery; no attempt of the others is counted."""
    shared.enable("scripted", place)
    sent = hand(shared, place, ["nothing"], ["nothing"])
    assert stay(shared, warm, [each.lane for each in sent], leave_after=0.0) == LaneDone(why="time")
    assert [each["attempts"] for both in sent for each in both.deliveries()] == [1, 0]
    assert left(shared, sent) == 0


def test_a_lane_that_was_lost(shared: World, warm: HandlerSlot, place: str) -> None:
    """A lane that another owner took over during the run is skipped, and the others are run."""
    shared.enable("scripted", place)
    sent = hand(shared, place, ["insert"], ["nothing"], ["nothing"])
    shared.execute("CREATE TABLE IF NOT EXISTS effects (n integer, attempt integer)")
    shared.execute(f"""
        CREATE OR REPLACE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            UPDATE lanes SET epoch = epoch + 1, owner = 'another' WHERE lane = '{sent[1].lane}'; RETURN NEW; END $$""")
    shared.execute("CREATE TRIGGER lose AFTER INSERT ON effects FOR EACH ROW EXECUTE FUNCTION lose()")
    try:
        assert stay(shared, warm, [each.lane for each in sent]) == LaneDone(why="empty")
    finally:
        shared.execute("DROP TRIGGER lose ON effects")
    assert [each.ran() for each in sent] == [[1], [], [1]]
    assert [each.states() for each in sent] == [["succeeded"], ["pending"], ["succeeded"]]


def test_what_comes_next(shared: World, place: str) -> None:
    """The scheduler continues after the last lane, visits every due lane, one destination at a time, takes more lanes
    if the handler is quick and fewer if it is slow, and ends when none is due.
    """
    other = f"{place}z"
    shared.add_destination(other)
    for each in (place, other):
        shared.enable("holding", each)
    made = [
        each.lane
        for where in (place, other)
        for each in [shared.hand("nothing", destination=where, source=f"s{number:02}") for number in range(7)]
    ]
    walk = LaneScheduler(Leases(shared.engine, "tester"))
    first = walk.next("holding")
    walk.took("holding", 0.001)
    found = [walk.next("holding") for _ in range(3)]
    assert [len(first), *map(len, found)] == [4, 3, 7, 7]
    assert [*first, *found[0], *found[1]] == made
    assert found[2] == made[:7]  # nobody has taken them, so they are found again
    for _ in range(10):
        walk.took("holding", lane_scheduler.BATCH_SECONDS)
    assert len(walk.next("holding")) == 1
    shared.execute("UPDATE deliveries SET state = 'skipped' WHERE lane = ANY(:lanes)", lanes=made)
    assert walk.next("holding") == []
    assert walk.next("holding") == []


def test_a_worker_runs_many_lanes(world: World) -> None:
    """A worker runs hundreds of lanes, each in order and each delivery once.

    A lane whose handler hangs blocks no other. In the end no job is left.
    """
    world.enable("patient-one")
    flag = world.flag("go")
    world.add_destination("other")
    stuck = world.hand(f"wait_for:{flag}", source="a-stuck-one")
    with world.ledger() as ledger:
        waiting = [ledger.accept(world.admitted(source=f"s{number % 150}")) for number in range(450)]
        for each in waiting:
            each.result(60)
    process = world.start_worker(RECEIVER_CONCURRENCY="2")
    until(lambda: world.states()[1:] == ["succeeded"] * 450, "all but the stuck one have run")
    assert stuck.states() == ["pending"]
    flag.touch()
    stuck.until_done()

    ran = [line["n"] for line in world.journal("begin")]
    assert len(ran) == len(set(ran)) == 451
    for number in range(150):
        assert [n for n in ran if n > 1 and (n - 2) % 150 == number] == [number + 2, number + 152, number + 302]
    until(lambda: not world.rows("SELECT FROM procrastinate.procrastinate_jobs"), "no job is left")
    assert len(handler_processes(process.pid)) == 2
