from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec import structs
from sqlalchemy import Engine, text

from receiver.errors import Conflict, NotFound
from receiver.keyring import Keyring
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence import verify
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.operations import corrections, queries
from receiver.storage.operations.corrections import CorrectionBatch, Corrections, CorrectionTask
from receiver.storage.operations.queries import AuditFilter, DeliveryFilter, MessageFilter
from tests.storage.door import SOURCE, Door, body, handler, until
from tests.storage.hand import LANE, Hand, arrive

STRANGER = "22222222-2222-4222-8222-222222222222"
WHY = "register lost the patient, fixed in 1.4.2"


@pytest.fixture
def verbs(engine: Engine, keyring: Keyring) -> Corrections:
    """The verbs, in the name of somebody."""
    return Corrections(engine, keyring, actor="alice@ops1")


@pytest.fixture
def hand(engine: Engine) -> Hand:
    """A hand on the lane of the door's one source."""
    return Hand(engine)


def now() -> datetime:
    return datetime.now(UTC)


def carried_out(work: CorrectionTask) -> list[CorrectionBatch]:
    return list(work.batches)


def only(work: CorrectionTask) -> CorrectionBatch:
    """The one batch that it is."""
    (batch,) = work.batches
    return batch


def states(door: Door) -> list[str]:
    return [row.state for row in door.rows("SELECT state FROM deliveries ORDER BY id")]


def whys(batch: CorrectionBatch) -> list[str]:
    return [each.why for each in batch.left]


def kill(hand: Hand, count: int, **how: Any) -> list[int]:
    """Let so many deliveries die."""
    return [hand.take().fail(**how) for _ in range(count)]


def snapshot(door: Door) -> list[Any]:
    """Everything that corrections touch."""
    return [
        door.rows(f"SELECT * FROM {table} ORDER BY 1")
        for table in ("deliveries", "lanes", "messages", "message_keys", "audit_events")
    ]


class TestRetry:
    def test_a_dead_delivery_runs_again_as_itself(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand
    ) -> None:
        """Retry keeps the delivery's row, and so its id and generation: its idempotency key; all attempts are anew."""
        door.enable()
        arrive(door, ledger, body())
        (dead,) = kill(hand, 1)

        batch = only(verbs.retry(DeliveryFilter(ids=(dead,)), now(), reason=WHY))

        assert batch == CorrectionBatch(done=(dead,), left=(), last=dead, lanes=(LANE,))
        (row,) = door.rows("SELECT id, state, attempts, generation, finished_at, started_at FROM deliveries")
        assert tuple(row) == (dead, "pending", 0, 1, None, None)

    def test_it_keeps_its_place(self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand) -> None:
        """What died runs before what came after it and is still pending."""
        door.enable()
        arrive(door, ledger, body("first"), body("second"))
        (dead,) = kill(hand, 1)
        carried_out(verbs.retry(DeliveryFilter(ids=(dead,)), now(), reason=WHY))

        following = hand.take().next()
        assert following is not None
        assert following.id == dead

    def test_filters_mean_the_dead(self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand) -> None:
        """Chosen by handler and error class, only dead deliveries of that class run again."""
        door.enable()
        arrive(door, ledger, *(body(f"log-{each}") for each in range(4)))
        kill(hand, 1, error_class="KeyError")
        kill(hand, 1, error_class="ValueError")
        hand.take().succeed()
        hand.leave()

        where = DeliveryFilter(handler="register", error_class="KeyError", destination="clinic")
        assert len(only(verbs.retry(where, now(), reason=WHY)).done) == 1
        assert states(door) == ["pending", "dead", "succeeded", "pending"]

    def test_a_success_is_never_repeated(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand
    ) -> None:
        """A succeeded delivery is left, and the way to hand its message over anew is named."""
        door.enable()
        arrive(door, ledger, body())
        hand.take().succeed()
        hand.leave()
        number = door.value("SELECT id FROM deliveries")

        batch = only(verbs.retry(DeliveryFilter(ids=(number,)), now(), reason=WHY))
        assert batch.done == ()
        assert "messages replay" in whys(batch)[0]
        assert states(door) == ["succeeded"]

    def test_one_that_waits_for_its_next_attempt_waits_no_longer(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand
    ) -> None:
        """Retry of a pending delivery ends its pause and that of its lane, which can be claimed at once."""
        door.enable()
        arrive(door, ledger, body())
        number = hand.take().fail("pending", lane_state="waiting", pause=600)

        carried_out(verbs.retry(DeliveryFilter(ids=(number,)), now(), reason=WHY))

        assert door.rows("SELECT state, ready_at FROM lanes") == [("ready", None)]
        assert hand.take().begin() == number

    def test_a_held_lane_goes_on(self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand) -> None:
        """The lane that was held for a delivery runs again when that delivery is retried."""
        door.enable(handler(on_failure="hold"))
        arrive(door, ledger, body())
        number = hand.take().fail("pending", lane_state="held")
        assert door.value("SELECT state FROM lanes") == "held"

        carried_out(verbs.retry(DeliveryFilter(ids=(number,)), now(), reason=WHY))
        assert hand.take().begin() == number

    def test_another_delivery_does_not_free_a_held_lane(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand
    ) -> None:
        """A lane stays held when what is retried is not what it is held for."""
        door.enable()
        arrive(door, ledger, body("first"), body("second"))
        (dead,) = kill(hand, 1)
        hand.take().fail("pending", lane_state="held")

        carried_out(verbs.retry(DeliveryFilter(ids=(dead,)), now(), reason=WHY))
        assert door.value("SELECT state FROM lanes") == "held"

    def test_what_ran_in_a_request_becomes_a_workers(
        self, door: Door, ledger: MessageLedger, verbs: Corrections
    ) -> None:
        """Nobody waits for the answer any more, so that a worker takes it."""
        door.enable(handler(acknowledge="after_handling"))
        arrive(door, ledger, body())
        door.rows("UPDATE deliveries SET state = 'dead'")
        assert door.value("SELECT inline FROM deliveries") is True

        carried_out(verbs.retry(DeliveryFilter(state="dead"), now(), reason=WHY))
        assert door.rows("SELECT state, inline FROM deliveries") == [("pending", False)]

    def test_newer_messages_that_were_handled_are_counted(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand
    ) -> None:
        """The count is of messages that came later, in the same lane, and succeeded: each once."""
        door.enable()
        door.enable(handler("other"))
        arrive(door, ledger, *(body(f"log-{each}") for each in range(5)))
        dead = kill(hand, 2)
        hand.take().succeed(2)
        hand.leave()

        assert only(verbs.retry(DeliveryFilter(ids=tuple(dead)), now(), reason=WHY)).newer == 2

    def test_where_there_is_no_order_nothing_is_newer(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, engine: Engine
    ) -> None:
        """In lanes of a handler without order nothing is overtaken, so nothing is counted."""
        door.enable(handler(ordering="none"))
        arrive(door, ledger, *(body(f"log-{each}") for each in range(3)))
        door.rows("UPDATE deliveries SET lane = 'register/clinic/any:0', state = 'succeeded'")
        door.rows("UPDATE deliveries SET state = 'dead' WHERE id = (SELECT min(id) FROM deliveries)")

        assert only(verbs.retry(DeliveryFilter(state="dead"), now(), reason=WHY)).newer == 0


class TestSkip:
    @pytest.mark.parametrize("state", ["pending", "dead"])
    def test_a_delivery_is_given_up(self, door: Door, ledger: MessageLedger, verbs: Corrections, state: str) -> None:
        """Pending and dead deliveries can be skipped, and have a time when that was."""
        door.enable()
        arrive(door, ledger, body())
        door.rows("UPDATE deliveries SET state = :state", state=state)
        number = door.value("SELECT id FROM deliveries")

        assert only(verbs.skip(DeliveryFilter(ids=(number,)), now(), reason=WHY)).done == (number,)
        (row,) = door.rows("SELECT state, finished_at FROM deliveries")
        assert row.state == "skipped"
        assert row.finished_at is not None

    def test_a_held_lane_goes_on_behind_it(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand
    ) -> None:
        """When the delivery that a lane is held for is skipped, the next one runs."""
        door.enable(handler(on_failure="hold"))
        arrive(door, ledger, body("first"), body("second"))
        number = hand.take().fail("pending", lane_state="held")

        carried_out(verbs.skip(DeliveryFilter(ids=(number,)), now(), reason=WHY))
        assert hand.take().begin() > number

    def test_what_runs_now_is_left(self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand) -> None:
        """A delivery that a worker has begun is not touched: the lane is named, and its success is recorded."""
        door.enable()
        arrive(door, ledger, body("first"), body("second"))
        running = hand.take().begin()

        batch = only(verbs.skip(DeliveryFilter(handler="register", state="pending"), now(), reason=WHY))

        assert LANE in whys(batch)[0]
        assert [each.id for each in batch.left] == [running]
        assert states(door) == ["pending", "skipped"]

    def test_what_its_worker_lost_can_be_skipped(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand
    ) -> None:
        """An attempt whose lease has run out stops nobody, and the worker that comes back records nothing."""
        door.enable()
        arrive(door, ledger, body())
        number = hand.take().begin()
        door.rows("UPDATE lanes SET lease_until = now() - interval '1 second'")

        assert only(verbs.skip(DeliveryFilter(ids=(number,)), now(), reason=WHY)).done == (number,)
        with pytest.raises(AssertionError):
            hand.succeed()
        assert states(door) == ["skipped"]

    def test_what_is_skipped_stays_so(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """Skipping once more changes nothing and says so."""
        door.enable()
        arrive(door, ledger, body())
        where = DeliveryFilter(ids=(door.value("SELECT id FROM deliveries"),))
        carried_out(verbs.skip(where, now(), reason=WHY))
        assert whys(only(verbs.skip(where, now(), reason=WHY))) == ["skipped already"]


class TestReplay:
    def test_a_new_generation_at_the_end(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand
    ) -> None:
        """Replay makes a new delivery behind all others, of the next generation; the old one stays as it is."""
        door.enable()
        first, _ = arrive(door, ledger, body("first"), body("second"))
        hand.take().succeed()
        hand.leave()

        batch = only(verbs.replay(MessageFilter(ids=(first,)), now(), reason=WHY))

        assert (batch.done, batch.made, batch.lanes) == ((first,), 1, (LANE,))
        rows = door.rows("SELECT message_id, generation, state, lane, inline FROM deliveries ORDER BY id")
        assert [tuple(row) for row in rows][::2] == [
            (first, 1, "succeeded", LANE, False),
            (first, 2, "pending", LANE, False),
        ]

    def test_newer_messages_that_were_handled_are_counted(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand
    ) -> None:
        """What is replayed runs after what came later: of how many that is true already is told."""
        door.enable()
        first, *_ = arrive(door, ledger, *(body(f"log-{each}") for each in range(4)))
        hand.take().succeed(3)
        hand.leave()
        assert only(verbs.replay(MessageFilter(ids=(first,)), now(), reason=WHY)).newer == 2

    def test_to_those_that_are_enabled_now(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """A message that nobody took goes to the handlers of today, and is no longer unhandled."""
        (number,) = arrive(door, ledger, body())
        assert door.value("SELECT state FROM messages") == "unhandled"
        door.enable()
        door.enable(handler("other", ordering="patient", patient_key="MR"))

        assert only(verbs.replay(MessageFilter(ids=(number,)), now(), reason=WHY)).made == 2
        assert door.value("SELECT state FROM messages") == "accepted"
        lanes = {row.lane for row in door.rows("SELECT lane FROM deliveries")}
        assert LANE in lanes
        assert any(lane.startswith("other/clinic/patient:") for lane in lanes)

    def test_to_one_handler_alone(self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand) -> None:
        """With a handler named, the others get nothing."""
        door.enable()
        door.enable(handler("other"))
        (number,) = arrive(door, ledger, body())
        hand.take().succeed()
        hand.leave()

        carried_out(verbs.replay(MessageFilter(ids=(number,)), now(), handler="register", reason=WHY))
        assert [tuple(row) for row in door.rows("SELECT handler, generation FROM deliveries ORDER BY id")][2:] == [
            ("register", 2)
        ]

    def test_what_is_pending_is_not_doubled(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """A message whose delivery still waits is left, so that a replay that was interrupted can be repeated."""
        door.enable()
        (number,) = arrive(door, ledger, body())
        assert whys(only(verbs.replay(MessageFilter(ids=(number,)), now(), reason=WHY))) == ["is pending already"]
        assert len(states(door)) == 1

    def test_a_purged_payload_is_refused(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """Without its bytes a message cannot be handed over, and that is said."""
        (number,) = arrive(door, ledger, body())
        door.enable()
        door.rows("DELETE FROM payloads")
        assert "purged" in whys(only(verbs.replay(MessageFilter(ids=(number,)), now(), reason=WHY)))[0]

    def test_a_payload_that_was_changed_is_refused(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """One message whose bytes do not prove to be those received is left; the others are replayed."""
        numbers = arrive(door, ledger, body("first"), body("second"))
        door.enable()
        door.rows("UPDATE payloads SET sealed = sealed || '\\x00' WHERE message_id = :id", id=numbers[0])
        batch = only(verbs.replay(MessageFilter(destination="clinic"), now(), reason=WHY))
        assert [each.id for each in batch.left] == numbers[:1]
        assert batch.done == (numbers[1],)

    def test_what_nobody_takes_is_left(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """Where no handler takes the kind, that is said, and by which name none does."""
        (number,) = arrive(door, ledger, body())
        where = MessageFilter(ids=(number,))
        assert whys(only(verbs.replay(where, now(), reason=WHY))) == ["no enabled handler takes PatientAdmin.Arrival"]
        assert "other is not enabled" in whys(only(verbs.replay(where, now(), handler="other", reason=WHY)))[0]

    def test_neither_quarantine_nor_query(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """What is in quarantine has a command of its own, and the asker of a query no longer waits."""
        door.enable()
        numbers = arrive(door, ledger, b"no json", body(kind="PatientSearch.Query"))
        batch = only(verbs.replay(MessageFilter(ids=tuple(numbers)), now(), reason=WHY))
        assert "messages release" in whys(batch)[0]
        assert "query" in whys(batch)[1]

    def test_after_goes_on_where_one_stopped(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """Only messages with a higher id are looked at."""
        numbers = arrive(door, ledger, *(body(f"log-{each}") for each in range(3)))
        door.enable()
        work = verbs.replay(MessageFilter(destination="clinic"), now(), reason=WHY, after=numbers[0])
        assert work.total == 2
        assert only(work).done == tuple(numbers[1:])


class TestRelease:
    def test_of_a_source_that_is_registered_now(
        self,
        open_ledger: Callable[..., MessageLedger],
        verbs: Corrections,
        engine: Engine,
        keyring: Keyring,
        registration: Any,
    ) -> None:
        """A message kept because nobody knew its source is handed over when somebody does."""
        door = Door(engine, keyring, registration).build(on_unknown_source="quarantine")
        door.enable()
        (number,) = arrive(door, open_ledger(), body(source=STRANGER))
        registration.add_source("clinic", STRANGER, now(), name=None)

        batch = only(verbs.release(MessageFilter(ids=(number,)), now(), reason=WHY))

        assert (batch.done, batch.made) == ((number,), 1)
        assert door.rows("SELECT state, quarantine_reason FROM messages") == [("accepted", None)]
        assert states(door) == ["pending"]

    def test_unhandled_where_nobody_takes_it(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """Released without a handler, it is unhandled like any other."""
        (number,) = arrive(door, ledger, body(Test=True))
        door.registration.set_destination("clinic", now(), {"test_messages": "accept"})
        assert only(verbs.release(MessageFilter(ids=(number,)), now(), reason=WHY)).done == (number,)
        assert door.value("SELECT state FROM messages") == "unhandled"

    def test_what_is_still_bad_stays(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """It stays in quarantine, and the reason of today is told and kept."""
        (number,) = arrive(door, ledger, b'{"Meta": 3}')
        door.rows("UPDATE messages SET quarantine_reason = 'of_an_older_version'")
        batch = only(verbs.release(MessageFilter(state="quarantined"), now(), reason=WHY))
        assert whys(batch) == ["stays in quarantine: meta_not_object"]
        assert door.rows("SELECT state, quarantine_reason FROM messages") == [("quarantined", "meta_not_object")]
        assert number == batch.last

    @pytest.fixture
    def unreadable(self, door: Door) -> Callable[[bytes], Any]:
        """A readable message, as a version admits it that cannot read it yet."""
        return lambda content: structs.replace(door.admit(content), message=None, quarantine="not_json")

    def test_what_can_be_read_by_now_is_as_if_it_had_been(
        self,
        door: Door,
        ledger: MessageLedger,
        verbs: Corrections,
        engine: Engine,
        keyring: Keyring,
        unreadable: Callable[[bytes], Any],
    ) -> None:
        """Its columns are filled, its row is signed anew, and a repeat is known as one."""
        door.enable()
        ledger.accept(unreadable(body("log-1"))).result(30)

        carried_out(verbs.release(MessageFilter(state="quarantined"), now(), reason=WHY))

        (row,) = door.rows("SELECT kind, log_id, source_id, state FROM messages")
        assert tuple(row) == ("PatientAdmin.Arrival", "log-1", SOURCE, "accepted")
        with engine.connect() as connection:
            assert verify.verify(connection, keyring, payloads=True).first_bad is None
        assert ledger.accept(door.admit(body("log-1"))).result(30).outcome == "duplicate"
        assert states(door) == ["pending"]

    def test_what_came_again_meanwhile_is_not_handled_twice(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, unreadable: Callable[[bytes], Any]
    ) -> None:
        """When the same message was accepted since, the one in quarantine stays there."""
        door.enable()
        first = ledger.accept(unreadable(body("log-1"))).result(30).message_id
        arrive(door, ledger, body("log-1"))

        batch = only(verbs.release(MessageFilter(ids=(first,)), now(), reason=WHY))
        assert "received again" in whys(batch)[0]
        assert states(door) == ["pending"]

    def test_a_row_that_was_changed_is_not_signed(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, unreadable: Callable[[bytes], Any]
    ) -> None:
        """A message whose row does not prove to be ours is left: signing it would make it so."""
        ledger.accept(unreadable(body("log-1"))).result(30)
        door.rows("UPDATE messages SET peer = '198.51.100.7'")
        assert "audit verify" in whys(only(verbs.release(MessageFilter(state="quarantined"), now(), reason=WHY)))[0]

    def test_a_query_is_nobodys_by_now(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """An unreadable query cannot be released: its asker was told long ago."""
        again = b', "Meta": {"DataModel": "PatientSearch", "EventType": "Query"}}'
        content = body(kind="PatientSearch.Query")[:-1] + again
        arrive(door, ledger, content)
        assert "query" in whys(only(verbs.release(MessageFilter(state="quarantined"), now(), reason=WHY)))[0]

    def test_only_from_quarantine(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """What was accepted can neither be released nor discarded."""
        (number,) = arrive(door, ledger, body())
        for work in (
            verbs.release(MessageFilter(ids=(number,)), now(), reason=WHY),
            verbs.discard(MessageFilter(ids=(number,)), now(), reason=WHY),
        ):
            assert whys(only(work)) == ["is not in quarantine"]


class TestDiscard:
    def test_it_is_given_up_and_kept(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """Discarded messages count no more as quarantined; their bytes stay until they are purged."""
        (number,) = arrive(door, ledger, b"no json")
        assert only(verbs.discard(MessageFilter(quarantine_reason="not_json"), now(), reason=WHY)).done == (number,)
        assert door.value("SELECT state FROM messages") == "discarded"
        assert door.value("SELECT count(*) FROM payloads") == 1


class TestLanes:
    def test_release_lets_the_head_run_once_more(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand
    ) -> None:
        """A held lane can be claimed after its release, and begins with what it was held for."""
        door.enable(handler(on_failure="hold"))
        arrive(door, ledger, body())
        number = hand.take().fail("pending", lane_state="held")
        verbs.release_lane(LANE, now(), reason=None)
        assert hand.take().begin() == number

    def test_only_a_held_one(self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand) -> None:
        """A lane that is not held, and one that is not there, are told apart."""
        door.enable()
        arrive(door, ledger, body())
        with pytest.raises(NotFound):
            verbs.release_lane(LANE, now(), reason=None)
        hand.take()
        with pytest.raises(Conflict, match="not held"):
            verbs.release_lane(LANE, now(), reason=None)


class TestEvidence:
    def test_every_change_has_its_audit_row(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand, engine: Engine, keyring: Keyring
    ) -> None:
        """One row for each delivery, message and lane: who, which, what of which message, and why, sealed."""
        door.enable(handler(on_failure="hold"))
        good, bad = arrive(door, ledger, body("first"), b"no json")
        held = hand.take().fail("pending", lane_state="held")
        verbs.release_lane(LANE, now(), reason=WHY)
        carried_out(verbs.retry(DeliveryFilter(ids=(held,)), now(), reason=WHY))
        carried_out(verbs.skip(DeliveryFilter(ids=(held,)), now(), reason=WHY))
        carried_out(verbs.replay(MessageFilter(ids=(good,)), now(), reason=WHY))
        carried_out(verbs.discard(MessageFilter(ids=(bad,)), now(), reason=WHY))

        with engine.connect() as connection:
            told = queries.audit(connection, AuditFilter(actor="alice@ops1"), limit=10)[::-1]
            assert [(each["action"], each["outcome"], each["subject"]) for each in told] == [
                ("lane.release", "ready", f"lanes:{LANE}"),
                ("delivery.retry", "pending", f"deliveries:{held}"),
                ("delivery.skip", "skipped", f"deliveries:{held}"),
                ("message.replay", "accepted", f"messages:{good}"),
                ("message.discard", "discarded", f"messages:{bad}"),
            ]
            assert all(each["destination"] == "clinic" for each in told)
            uuid = queries.message(connection, good)["uuid"]
            assert [each["message_uuid"] for each in told[1:4]] == [uuid] * 3
            assert {queries.note(connection, Sealer(keyring), each["id"]) for each in told} == {WHY}
            assert verify.verify(connection, keyring).first_bad is None
        assert WHY.encode() not in door.value("SELECT string_agg(note, '') FROM audit_events")

    def test_a_replay_is_linked_to_what_it_repeats(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """The audit row of a replay names the deliveries that it made."""
        (number,) = arrive(door, ledger, body())
        door.enable()
        carried_out(verbs.replay(MessageFilter(ids=(number,)), now(), reason=WHY))
        made = door.value("SELECT id FROM deliveries")
        with door.engine.connect() as connection:
            (told,) = queries.audit(connection, AuditFilter(action="message.replay"), limit=2)
        assert told["detail"] == {"deliveries": [made]}

    def test_what_is_left_has_none(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """Nothing is told of what was not touched."""
        (number,) = arrive(door, ledger, body())
        carried_out(verbs.replay(MessageFilter(ids=(number,)), now(), reason=WHY))
        assert door.value("SELECT count(*) FROM audit_events WHERE actor = 'alice@ops1'") == 0


class TestDryRun:
    def every(self, verbs: Corrections, dry_run: bool) -> Iterable[CorrectionTask]:
        where = MessageFilter(destination="clinic")
        yield verbs.retry(DeliveryFilter(destination="clinic"), now(), reason=WHY, dry_run=dry_run)
        yield verbs.skip(DeliveryFilter(destination="clinic", state="dead"), now(), reason=WHY, dry_run=dry_run)
        yield verbs.replay(where, now(), reason=WHY, dry_run=dry_run)
        yield verbs.release(where, now(), reason=WHY, dry_run=dry_run)
        yield verbs.discard(where, now(), reason=WHY, dry_run=dry_run)

    def test_it_changes_nothing(self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand) -> None:
        """No row of any table is other after the dry run of every verb, each of which had something to do."""
        door.enable()
        arrive(door, ledger, body("first"), body("second"), body("third", Test=True))
        kill(hand, 2)
        door.registration.set_destination("clinic", now(), {"test_messages": "accept"})
        before = snapshot(door)
        for work in self.every(verbs, dry_run=True):
            assert any(batch.done for batch in work.batches)
        assert snapshot(door) == before

    def test_it_tells_what_will_happen(self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand) -> None:
        """What a dry run tells is what the same command then does, newer messages included."""
        door.enable()
        arrive(door, ledger, *(body(f"log-{each}") for each in range(4)))
        kill(hand, 2)
        hand.take().succeed(1)
        hand.leave()
        where = DeliveryFilter(destination="clinic")
        told = carried_out(verbs.retry(where, now(), reason=WHY, dry_run=True))
        assert told[0].newer == 1
        assert carried_out(verbs.retry(where, now(), reason=WHY)) == told


class TestBatches:
    def test_they_are_bounded_and_each_stands_for_itself(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is interrupted after a batch is done as far; the same command again does the rest, and no more."""
        monkeypatch.setattr(corrections, "ROWS", 2)
        door.enable()
        arrive(door, ledger, *(body(f"log-{each}") for each in range(5)))
        dead = kill(hand, 5)
        where = DeliveryFilter(handler="register")

        work = verbs.retry(where, now(), reason=WHY)
        assert work.total == 5
        assert next(work.batches).done == tuple(dead[:2])
        assert states(door) == ["pending"] * 2 + ["dead"] * 3

        rest = verbs.retry(where, now(), reason=WHY)
        assert rest.total == 3
        assert [batch.done for batch in rest.batches] == [(dead[2], dead[3]), (dead[4],)]

    def test_newer_messages_are_counted_once_a_lane(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A lane that goes through several batches is counted in the first."""
        monkeypatch.setattr(corrections, "ROWS", 1)
        door.enable()
        arrive(door, ledger, *(body(f"log-{each}") for each in range(3)))
        kill(hand, 2)
        hand.take().succeed()
        hand.leave()
        batches = carried_out(verbs.retry(DeliveryFilter(handler="register"), now(), reason=WHY))
        assert [batch.newer for batch in batches] == [1, 0]

    def test_a_deadlock_is_survived(
        self, door: Door, ledger: MessageLedger, verbs: Corrections, hand: Hand, engine: Engine
    ) -> None:
        """A batch that PostgreSQL ends because its locks crossed another's is done again."""
        door.enable()
        arrive(door, ledger, body("first"), body("second"))
        dead = kill(hand, 2)
        done: list[CorrectionBatch] = []
        lock = text("SELECT id FROM deliveries WHERE id = :id FOR UPDATE")
        with engine.connect() as other:
            other.execute(text("SET deadlock_timeout = '1min'"))  # it is the batch that is found and ended
            other.execute(lock, {"id": dead[1]})
            worker = threading.Thread(
                target=lambda: done.extend(verbs.retry(DeliveryFilter(state="dead"), now(), reason=WHY).batches)
            )
            worker.start()
            until(lambda: door.value("SELECT count(*) FROM pg_locks WHERE NOT granted"), "the batch waits")
            other.execute(lock, {"id": dead[0]})
            other.rollback()
        worker.join(30)
        assert [batch.done for batch in done] == [tuple(dead)]
        assert states(door) == ["pending", "pending"]

    def test_an_id_that_is_not_there(self, door: Door, ledger: MessageLedger, verbs: Corrections) -> None:
        """Of several ids none is touched when one of them is of nothing."""
        door.enable()
        arrive(door, ledger, body())
        number = door.value("SELECT id FROM deliveries")
        with pytest.raises(NotFound, match="999999"):
            verbs.skip(DeliveryFilter(ids=(number, 999999)), now(), reason=WHY)
        with pytest.raises(NotFound, match="destination list"):
            verbs.skip(DeliveryFilter(destination="nowhere"), now(), reason=WHY)
        assert states(door) == ["pending"]

    def test_a_destination_whose_row_was_changed_gets_nothing(
        self, door: Door, ledger: MessageLedger, verbs: Corrections
    ) -> None:
        """Where the registry's row does not prove to be ours, its messages are left."""
        (number,) = arrive(door, ledger, body())
        door.rows("UPDATE destinations SET environment = 'staging'")
        batch = only(verbs.replay(MessageFilter(ids=(number,)), now(), reason=WHY))
        assert "audit verify" in whys(batch)[0]
