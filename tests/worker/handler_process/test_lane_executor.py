"""Runs of lanes: real handler processes on a real database."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from receiver import retry_policy
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.queue.outcomes import delivery_binding
from receiver.worker.handler_process.ipc import LaneDone
from receiver.worker.handler_process.supervisor import HandlerSlot
from tests.worker.plugins.scripted import PATIENT
from tests.worker.world import World


@pytest.fixture(scope="module", autouse=True)
def _tables(shared: World) -> None:
    shared.execute("CREATE TABLE effects (n integer, attempt integer)")
    shared.execute("CREATE TABLE twins (n integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")


def effects(world: World, numbers: list[int]) -> list[int]:
    return [row["n"] for row in world.rows("SELECT n FROM effects WHERE n = ANY(:n) ORDER BY n", n=numbers)]


def test_in_order(shared: World, warm: HandlerSlot, place: str) -> None:
    """The deliveries of a lane run one after another, oldest first, each once, and each attempt is recorded."""
    shared.enable("scripted", place)
    sent = shared.hand(*["nothing"] * 150, destination=place)

    assert shared.stay(warm, sent.lane) == LaneDone(why="empty")
    assert sent.ran() == list(range(1, 151))
    assert set(sent.states()) == {"succeeded"}
    assert [(each["attempt"], each["outcome"], each["error_class"]) for each in sent.attempts()] == [
        (1, "succeeded", None)
    ] * 150
    assert all(each["started_at"] <= each["ended_at"] for each in sent.attempts())
    assert all(each["finished_at"] is not None and each["started_at"] is None for each in sent.deliveries())


def test_what_a_handler_gets(shared: World, warm: HandlerSlot, place: str) -> None:
    """A handler gets the message as received, typed on request, and the same idempotency key at each attempt."""
    shared.enable("patient-one", place)  # the typed class is imported, which takes its time
    sent = shared.hand("facts", "raise:2", destination=place, source="Ward7")
    shared.stay(warm, sent.lane)
    shared.let_time_pass()
    shared.stay(warm, sent.lane)

    [facts] = sent.journal("facts")
    size = shared.rows("SELECT size FROM messages WHERE id = :id", id=sent.receipts[0].message_id)[0]["size"]
    assert (facts["kind"], facts["source"], facts["log"], facts["test"]) == (
        "PatientAdmin.Arrival",
        "Ward7",
        f"log-{sent.first}",
        False,
    )
    assert (facts["bytes"], facts["model"]) == (size, "Arrival")
    first, second = sent.journal("begin")[1:]
    assert first["key"] == second["key"] == f"{sent.receipts[1].uuid}:patient-one:1"
    assert (first["attempt"], second["attempt"], first["replayed"]) == (1, 2, False)
    assert second["epoch"] > first["epoch"]


def test_a_new_generation(shared: World, warm: HandlerSlot, place: str) -> None:
    """A replayed delivery has another idempotency key, and `context.replayed` is set."""
    shared.enable("scripted", place)
    sent = shared.hand("nothing", destination=place)
    shared.execute("UPDATE deliveries SET generation = 2 WHERE message_id = :id", id=sent.receipts[0].message_id)
    shared.stay(warm, sent.lane)

    [begun] = sent.journal("begin")
    assert (begun["key"], begun["replayed"]) == (f"{sent.receipts[0].uuid}:scripted:2", True)


def test_a_failure_holds_back_its_lane_alone(shared: World, warm: HandlerSlot, place: str) -> None:
    """Later deliveries wait for a failed one; other lanes do not.

    After the last attempt it is dead, and the lane continues.
    """
    shared.enable("scripted", place)
    sent = shared.hand("nothing", "raise", "nothing", destination=place)
    other = shared.hand("nothing", destination=place, source="s2")

    assert shared.stay(warm, sent.lane) == LaneDone(why="waiting")
    assert sent.states() == ["succeeded", "pending", "pending"]
    [lane] = shared.rows("SELECT state, owner, ready_at - now() AS pause FROM lanes WHERE lane = :lane", lane=sent.lane)
    assert (lane["state"], lane["owner"]) == ("waiting", None)
    assert 0 < lane["pause"].total_seconds() <= retry_policy.FIRST_PAUSE * (1 + retry_policy.SPREAD)
    shared.hold_time()
    assert shared.stay(warm, sent.lane) is None
    assert shared.stay(warm, other.lane) == LaneDone(why="empty")

    shared.let_time_pass()
    assert shared.stay(warm, sent.lane) == LaneDone(why="dead", error_class="ValueError")
    assert shared.stay(warm, sent.lane) == LaneDone(why="empty")
    assert sent.states() == ["succeeded", "dead", "succeeded"]
    assert sent.ran() == [1, 2, 2, 3]


def test_what_is_kept_of_an_error(shared: World, warm: HandlerSlot, place: str) -> None:
    """The class and the frames of an error can be read. Its text, which may quote a patient, is sealed."""
    shared.enable("fragile", place)
    sent = shared.hand("raise", destination=place)
    shared.stay(warm, sent.lane)

    [row] = sent.deliveries()
    assert row["error_class"] == "ValueError"
    assert [frame.split(":")[::2] for frame in row["error_frames"]] == [
        ["tests.worker.plugins.scripted", name] for name in ("fragile", "act", "_raise")
    ]
    seals = Sealer(shared.keyring)
    assert seals.open(row["error_key"], row["error_sealed"], delivery_binding(row["id"])) == (
        f"no bed for {PATIENT}".encode()
    )
    with shared.engine.connect() as connection:
        for table in ("deliveries", "delivery_attempts"):
            assert PATIENT not in str(connection.execute(text(f"SELECT t::text FROM {table} t")).all())


def test_retry_later(shared: World, warm: HandlerSlot, place: str) -> None:
    """RetryLater does not count as an attempt, and makes the lane wait for the given time."""
    shared.enable("fragile", place)
    flag = shared.flag(f"up-{place}")
    sent = shared.hand(f"retry_later:3600:{flag}", "nothing", destination=place)
    for _ in range(3):
        assert shared.stay(warm, sent.lane) == LaneDone(why="waiting")
        [lane] = shared.rows("SELECT ready_at - now() AS pause FROM lanes WHERE lane = :lane", lane=sent.lane)
        assert 3500 < lane["pause"].total_seconds() <= 3600
        shared.let_time_pass()

    assert [each["attempts"] for each in sent.deliveries()] == [0, 0]
    assert sent.deliveries()[0]["deferred_since"] is not None
    flag.touch()
    assert shared.stay(warm, sent.lane) == LaneDone(why="empty")
    assert sent.outcomes() == ["retry_later"] * 3 + ["succeeded"] * 2
    assert sent.ran() == [1, 1, 1, 1, 2]


def test_retry_later_for_too_long(shared: World, warm: HandlerSlot, place: str) -> None:
    """After 72 hours RetryLater is a failed attempt."""
    shared.enable("fragile", place)
    sent = shared.hand("retry_later:1", destination=place)
    shared.execute(
        "UPDATE deliveries SET deferred_since = now() - interval '73 hours' WHERE lane = :lane", lane=sent.lane
    )

    assert shared.stay(warm, sent.lane) == LaneDone(why="dead", error_class="RetryLater")


def test_give_up(shared: World, warm: HandlerSlot, place: str) -> None:
    """GiveUp makes a delivery dead at once, with its code; the lane continues."""
    shared.enable("scripted", place)
    sent = shared.hand("give_up", "nothing", destination=place)

    assert shared.stay(warm, sent.lane) == LaneDone(why="dead", error_class="GiveUp:no_such_ward")
    assert shared.stay(warm, sent.lane) == LaneDone(why="empty")
    assert sent.outcomes() == ["gave_up", "succeeded"]


def test_hold(shared: World, warm: HandlerSlot, place: str) -> None:
    """With on_failure="hold" the lane is held after the last attempt.

    After its release the same delivery runs once more.
    """
    shared.enable("holding", place)
    flag = shared.flag(f"fixed-{place}")
    sent = shared.hand(f"retry_later:0:{flag}", "raise", "nothing", destination=place)
    flag.touch()

    assert shared.stay(warm, sent.lane) == LaneDone(why="waiting")
    assert shared.stay(warm, sent.lane) is None
    [lane] = shared.rows("SELECT state FROM lanes WHERE lane = :lane", lane=sent.lane)
    assert (lane["state"], sent.states()) == ("held", ["succeeded", "pending", "pending"])

    for _ in range(2):
        shared.execute("UPDATE lanes SET state = 'ready' WHERE lane = :lane", lane=sent.lane)
        assert shared.stay(warm, sent.lane) == LaneDone(why="waiting")
    shared.execute("UPDATE deliveries SET state = 'skipped' WHERE id = :id", id=sent.deliveries()[1]["id"])
    shared.execute("UPDATE lanes SET state = 'ready' WHERE lane = :lane", lane=sent.lane)
    assert shared.stay(warm, sent.lane) == LaneDone(why="empty")
    assert sent.states() == ["succeeded", "skipped", "succeeded"]
    assert sent.ran() == [1, 2, 2, 2, 3]


def test_patients_keep_their_own_order(shared: World, warm: HandlerSlot, place: str) -> None:
    """With ordering="patient" a failure blocks only its patient.

    Messages without that identifier keep the order of their source.
    """
    shared.enable("by-patient", place)
    ann = shared.hand("raise", "nothing", patient="1", destination=place)
    bob = shared.hand("nothing", "nothing", patient="2", destination=place)
    nobody = shared.hand("nothing", patient="", destination=place)
    assert ann.lane != bob.lane
    assert nobody.lane == f"by-patient/{place}/source:s1"

    assert [shared.stay(warm, each.lane) for each in (ann, bob, nobody)] == [
        LaneDone(why="waiting"),
        LaneDone(why="empty"),
        LaneDone(why="empty"),
    ]
    assert (ann.states(), bob.states()) == (["pending", "pending"], ["succeeded", "succeeded"])
    assert len(ann.lane.rpartition(":")[2]) == 32  # a digest, not the identifier


def test_without_order_nothing_waits(shared: World, warm: HandlerSlot, place: str) -> None:
    """With ordering="none" a waiting delivery does not block later ones, and runs when its pause is over."""
    shared.enable("unordered", place)
    sent = shared.hand("nothing", "raise:2", "retry_later:3600", "nothing", destination=place)
    lane = f"unordered/{place}/any:7"
    shared.execute(
        "UPDATE deliveries SET lane = :lane WHERE message_id = ANY(:ids)",
        lane=lane,
        ids=[each.message_id for each in sent.receipts],
    )

    assert shared.stay(warm, lane) == LaneDone(why="empty")
    assert sent.states() == ["succeeded", "pending", "pending", "succeeded"]
    assert sent.ran() == [1, 2, 3, 4]
    assert shared.rows("SELECT state FROM lanes WHERE lane = :lane", lane=lane) == [{"state": "ready"}]
    shared.let_time_pass()
    assert shared.stay(warm, lane) == LaneDone(why="empty")
    assert sent.states() == ["succeeded", "succeeded", "pending", "succeeded"]


def test_work_and_success_are_one(shared: World, warm: HandlerSlot, place: str) -> None:
    """Work on context.connection is committed once with the success, and rolled back with a failure."""
    shared.enable("scripted", place)
    sent = shared.hand("insert", "insert_raise:2", "insert_raise", "insert", destination=place)
    while sent.states() != ["succeeded", "succeeded", "dead", "succeeded"]:
        assert shared.stay(warm, sent.lane) is not None
        shared.let_time_pass()

    assert effects(shared, sent.numbers) == [sent.numbers[each] for each in (0, 1, 3)]
    assert sent.outcomes() == ["succeeded", "failed", "succeeded", "failed", "failed", "succeeded"]


def test_a_handler_does_not_commit(shared: World, warm: HandlerSlot, place: str) -> None:
    """A handler that commits gets an error, and its work is rolled back."""
    shared.enable("fragile", place)
    sent = shared.hand("commit", destination=place)

    assert shared.stay(warm, sent.lane) == LaneDone(why="dead", error_class="CommitNotAllowed")
    assert effects(shared, sent.numbers) == []


@pytest.mark.parametrize(("deed", "error_class"), [("spoil", "WorkAborted"), ("late_violation", "IntegrityError")])
def test_work_that_does_not_hold(shared: World, warm: HandlerSlot, place: str, deed: str, error_class: str) -> None:
    """A transaction that has failed without the handler's notice, or fails at its commit, is not a success."""
    shared.execute("DELETE FROM twins")
    shared.execute("INSERT INTO twins VALUES (1)")
    shared.enable("fragile", place)
    sent = shared.hand(deed, "nothing", destination=place)

    assert shared.stay(warm, sent.lane) == LaneDone(why="dead", error_class=error_class)
    assert effects(shared, sent.numbers) == []
    assert shared.stay(warm, sent.lane) == LaneDone(why="empty")


def test_a_lost_attempt_counts(shared: World, warm: HandlerSlot, place: str) -> None:
    """An attempt without an end, because its worker is gone, is recorded and counts, without a pause."""
    shared.enable("scripted", place)
    sent = shared.hand("nothing", "nothing", destination=place)
    first, second = (each["id"] for each in sent.deliveries())
    for attempts, delivery in ((1, first), (2, second)):
        shared.execute(
            "UPDATE deliveries SET attempts = :attempts, started_at = now() - interval '1 minute' WHERE id = :id",
            attempts=attempts,
            id=delivery,
        )

    assert shared.stay(warm, sent.lane) == LaneDone(why="dead", error_class="WorkerLost")
    assert [(each["attempt"], each["outcome"], each["error_class"]) for each in sent.attempts()] == [
        (1, "crashed", "WorkerLost"),
        (2, "succeeded", None),
        (2, "crashed", "WorkerLost"),
    ]
    assert sent.states() == ["succeeded", "dead"]


def test_a_payload_that_is_gone_or_changed(shared: World, warm: HandlerSlot, place: str) -> None:
    """A delivery whose payload is purged is given up; one whose payload cannot be opened fails. Neither is run."""
    shared.enable("fragile", place)
    sent = shared.hand("nothing", "nothing", destination=place)
    ids = [each.message_id for each in sent.receipts]
    shared.execute("DELETE FROM payloads WHERE message_id = :id", id=ids[0])
    shared.execute("UPDATE payloads SET sealed = sealed || '\\x00'::bytea WHERE message_id = :id", id=ids[1])

    assert shared.stay(warm, sent.lane) == LaneDone(why="dead", error_class="GiveUp:payload_purged")
    assert shared.stay(warm, sent.lane) == LaneDone(why="dead", error_class="IntegrityError")
    assert sent.ran() == []


@pytest.mark.parametrize(
    "edit",
    [
        "kind = 'PatientAdmin.Discharge'",
        "source_id = 'other'",
        "size = size + 1",
        "test = NOT test",
        "mac = sha256(mac)",
    ],
)
def test_a_message_that_was_changed_is_not_run(shared: World, warm: HandlerSlot, place: str, edit: str) -> None:
    """A handler never gets a message of which any column was changed after it was recorded."""
    shared.enable("fragile", place)
    sent = shared.hand("nothing", "nothing", destination=place)
    shared.execute(f"UPDATE messages SET {edit} WHERE id = :id", id=sent.receipts[0].message_id)

    assert shared.stay(warm, sent.lane) == LaneDone(why="dead", error_class="IntegrityError")
    assert shared.stay(warm, sent.lane) == LaneDone(why="empty")
    assert sent.ran() == [2]
    assert sent.states() == ["dead", "succeeded"]


@pytest.mark.parametrize("moved", ["the delivery", "its lane", "its message"])
def test_a_message_of_another_destination_is_not_run(shared: World, warm: HandlerSlot, place: str, moved: str) -> None:
    """A delivery runs only if it, its message and its lane belong to one destination."""
    other = f"{place}-other"
    shared.add_destination(other)
    shared.enable("fragile", place)
    shared.enable("fragile", other)
    sent = shared.hand("nothing", destination=place)
    elsewhere = shared.hand("nothing", destination=other)
    [delivery], [foreign] = sent.deliveries(), elsewhere.deliveries()
    shared.execute("DELETE FROM deliveries WHERE id = :id", id=foreign["id"])
    # A delivery finds its message by id and time.
    columns = {"the delivery": ["destination_id"], "its lane": ["lane", "destination_id"]}.get(
        moved, ["message_id", "received_at"]
    )
    changed = delivery | {name: foreign[name] for name in columns}
    shared.execute(
        "UPDATE deliveries SET lane = :lane, destination_id = :destination_id, message_id = :message_id, "
        "received_at = :received_at WHERE id = :id",
        **{name: changed[name] for name in ("lane", "destination_id", "message_id", "received_at", "id")},
    )

    assert shared.stay(warm, changed["lane"]) == LaneDone(why="dead", error_class="IntegrityError")
    assert sent.ran() + elsewhere.ran() == []


def test_a_pause_takes_hold_at_once(shared: World, warm: HandlerSlot, place: str) -> None:
    """After a handler is paused nothing more starts, including deliveries that were read ahead; they stay pending."""
    shared.enable("scripted", place)
    sent = shared.hand("nothing", destination=place)
    pausing = shared.hand("insert", *["nothing"] * 3, destination=place)
    shared.execute("""
        CREATE OR REPLACE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            UPDATE subscriptions s SET paused_at = now() FROM deliveries d JOIN messages m ON m.id = d.message_id
            WHERE d.state = 'pending' AND d.started_at IS NOT NULL AND s.handler = d.handler
              AND s.destination_id = d.destination_id;
            RETURN NEW; END $$""")
    shared.execute("CREATE TRIGGER pause AFTER INSERT ON effects FOR EACH ROW EXECUTE FUNCTION pause()")
    try:
        shared.stay(warm, sent.lane)
    finally:
        shared.execute("DROP TRIGGER pause ON effects")

    assert sent.states() + pausing.states() == ["succeeded", "succeeded", "pending", "pending", "pending"]
    assert shared.stay(warm, sent.lane) is None
    assert [each["attempts"] for each in pausing.deliveries()] == [1, 0, 0, 0]


def test_a_lane_is_left_in_time(shared: World, warm: HandlerSlot, place: str) -> None:
    """When its time is over, the run ends after the current delivery, and no attempt of the next one is counted."""
    shared.enable("scripted", place)
    sent = shared.hand("nothing", "nothing", destination=place)

    assert shared.stay(warm, sent.lane, leave_after=0.0) == LaneDone(why="time")
    assert [(each["state"], each["attempts"]) for each in sent.deliveries()] == [("succeeded", 1), ("pending", 0)]


def test_what_was_put_back_runs(shared: World, warm: HandlerSlot, place: str) -> None:
    """A delivery that is retried during the run runs in the same run, after the current one."""
    shared.enable("scripted", place)
    sent = shared.hand("raise:1", "insert", "nothing", destination=place)
    first = sent.deliveries()[0]["id"]
    shared.execute("UPDATE deliveries SET state = 'dead' WHERE id = :id", id=first)
    shared.execute(f"""
        CREATE OR REPLACE FUNCTION put_back() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            UPDATE deliveries SET state = 'pending' WHERE id = {first}; RETURN NEW; END $$""")
    shared.execute("CREATE TRIGGER put_back AFTER INSERT ON effects FOR EACH ROW EXECUTE FUNCTION put_back()")
    try:
        assert shared.stay(warm, sent.lane) == LaneDone(why="empty")
    finally:
        shared.execute("DROP TRIGGER put_back ON effects")

    assert sent.ran() == [2, 3, 1]


def test_a_lost_lease(shared: World, warm: HandlerSlot, place: str) -> None:
    """A run whose lane another owner took over records nothing, and rolls its work back."""
    shared.enable("scripted", place)
    sent = shared.hand("insert", "nothing", destination=place)
    shared.execute("""
        CREATE OR REPLACE FUNCTION take_over() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            UPDATE lanes SET epoch = epoch + 1, owner = 'another' WHERE owner = 'tester'; RETURN NEW; END $$""")
    shared.execute("CREATE TRIGGER take_over AFTER INSERT ON effects FOR EACH ROW EXECUTE FUNCTION take_over()")
    try:
        # Within the handler's own transaction it sees itself taken over, as it would see another's commit.
        assert shared.stay(warm, sent.lane) == LaneDone(why="fenced")
    finally:
        shared.execute("DROP TRIGGER take_over ON effects")

    assert effects(shared, sent.numbers) == []
    assert sent.attempts() == []
    assert [(each["state"], each["attempts"]) for each in sent.deliveries()] == [("pending", 1), ("pending", 0)]
