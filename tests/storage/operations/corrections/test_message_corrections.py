"""Corrections of messages: replay, release and discard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec import structs
from sqlalchemy import Engine

from receiver.keyring import Keyring
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence import verify
from receiver.storage.operations.corrections.message_corrections import MessageCorrections
from receiver.storage.operations.queries import MessageFilter
from tests.storage.door import SOURCE, Door, body, handler
from tests.storage.hand import LANE, Hand, arrive
from tests.storage.operations.corrections.helpers import REASON, carry_out, delivery_states, now, only_batch, whys

STRANGER = "22222222-2222-4222-8222-222222222222"


class TestReplay:
    def test_a_new_generation_at_the_end(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections, hand: Hand
    ) -> None:
        """Replay creates a delivery of the next generation at the end of the lane, and keeps the old one."""
        door.enable()
        first, _ = arrive(door, ledger, body("first"), body("second"))
        hand.take().succeed()
        hand.leave()

        batch = only_batch(message_corrections.replay(MessageFilter(ids=(first,)), now(), reason=REASON))

        assert (batch.done, batch.made, batch.lanes) == ((first,), 1, (LANE,))
        rows = door.rows("SELECT message_id, generation, state, lane, inline FROM deliveries ORDER BY id")
        assert [tuple(row) for row in rows][::2] == [
            (first, 1, "succeeded", LANE, False),
            (first, 2, "pending", LANE, False),
        ]

    def test_newer_messages_that_were_handled_are_counted(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections, hand: Hand
    ) -> None:
        """The newer messages that were handled already are counted."""
        door.enable()
        first, *_ = arrive(door, ledger, *(body(f"log-{each}") for each in range(4)))
        hand.take().succeed(3)
        hand.leave()
        assert only_batch(message_corrections.replay(MessageFilter(ids=(first,)), now(), reason=REASON)).newer == 2

    def test_to_those_that_are_enabled_now(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """An unhandled message goes to the handlers that are enabled now, and becomes accepted."""
        (number,) = arrive(door, ledger, body())
        assert door.value("SELECT state FROM messages") == "unhandled"
        door.enable()
        door.enable(handler("other", ordering="patient", patient_key="MR"))

        assert only_batch(message_corrections.replay(MessageFilter(ids=(number,)), now(), reason=REASON)).made == 2
        assert door.value("SELECT state FROM messages") == "accepted"
        lanes = {row.lane for row in door.rows("SELECT lane FROM deliveries")}
        assert LANE in lanes
        assert any(lane.startswith("other/clinic/patient:") for lane in lanes)

    def test_to_one_handler_alone(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections, hand: Hand
    ) -> None:
        """With `handler`, only that handler gets the message."""
        door.enable()
        door.enable(handler("other"))
        (number,) = arrive(door, ledger, body())
        hand.take().succeed()
        hand.leave()

        carry_out(message_corrections.replay(MessageFilter(ids=(number,)), now(), handler="register", reason=REASON))
        assert [tuple(row) for row in door.rows("SELECT handler, generation FROM deliveries ORDER BY id")][2:] == [
            ("register", 2)
        ]

    def test_what_is_pending_is_not_doubled(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """A message whose delivery is pending is left unchanged, so that an interrupted replay can be repeated."""
        door.enable()
        (number,) = arrive(door, ledger, body())
        assert whys(only_batch(message_corrections.replay(MessageFilter(ids=(number,)), now(), reason=REASON))) == [
            "is pending already"
        ]
        assert len(delivery_states(door)) == 1

    def test_a_purged_payload_is_refused(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """A message whose payload is purged is left unchanged, and reported."""
        (number,) = arrive(door, ledger, body())
        door.enable()
        door.rows("DELETE FROM payloads")
        assert (
            "purged"
            in whys(only_batch(message_corrections.replay(MessageFilter(ids=(number,)), now(), reason=REASON)))[0]
        )

    def test_a_payload_that_was_changed_is_refused(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """A message whose payload does not open is left unchanged; the others are replayed."""
        numbers = arrive(door, ledger, body("first"), body("second"))
        door.enable()
        door.rows("UPDATE payloads SET sealed = sealed || '\\x00' WHERE message_id = :id", id=numbers[0])
        batch = only_batch(message_corrections.replay(MessageFilter(destination="clinic"), now(), reason=REASON))
        assert [each.id for each in batch.left] == numbers[:1]
        assert batch.done == (numbers[1],)

    def test_what_nobody_takes_is_left(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """A message that no enabled handler takes is left unchanged, with the kind or the handler in the reason."""
        (number,) = arrive(door, ledger, body())
        where = MessageFilter(ids=(number,))
        assert whys(only_batch(message_corrections.replay(where, now(), reason=REASON))) == [
            "no enabled handler takes PatientAdmin.Arrival"
        ]
        assert (
            "other is not enabled"
            in whys(only_batch(message_corrections.replay(where, now(), handler="other", reason=REASON)))[0]
        )

    def test_neither_quarantine_nor_query(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """Messages in quarantine and queries are left unchanged, with a reason each."""
        door.enable()
        numbers = arrive(door, ledger, b"no json", body(kind="PatientSearch.Query"))
        batch = only_batch(message_corrections.replay(MessageFilter(ids=tuple(numbers)), now(), reason=REASON))
        assert "messages release" in whys(batch)[0]
        assert "query" in whys(batch)[1]

    def test_after_goes_on_where_one_stopped(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """With `after`, only messages with a higher id are replayed."""
        numbers = arrive(door, ledger, *(body(f"log-{each}") for each in range(3)))
        door.enable()
        work = message_corrections.replay(MessageFilter(destination="clinic"), now(), reason=REASON, after=numbers[0])
        assert work.total == 2
        assert only_batch(work).done == tuple(numbers[1:])


class TestRelease:
    def test_of_a_source_that_is_registered_now(
        self,
        open_ledger: Callable[..., MessageLedger],
        message_corrections: MessageCorrections,
        engine: Engine,
        keyring: Keyring,
        registration: Any,
    ) -> None:
        """A message of an unknown source is delivered after the source was registered."""
        door = Door(engine, keyring, registration).build(on_unknown_source="quarantine")
        door.enable()
        (number,) = arrive(door, open_ledger(), body(source=STRANGER))
        registration.add_source("clinic", STRANGER, now(), name=None)

        batch = only_batch(message_corrections.release(MessageFilter(ids=(number,)), now(), reason=REASON))

        assert (batch.done, batch.made) == ((number,), 1)
        assert door.rows("SELECT state, quarantine_reason FROM messages") == [("accepted", None)]
        assert delivery_states(door) == ["pending"]

    def test_unhandled_where_nobody_takes_it(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """A released message without a handler is unhandled."""
        (number,) = arrive(door, ledger, body(Test=True))
        door.registration.set_destination("clinic", now(), {"test_messages": "accept"})
        assert only_batch(message_corrections.release(MessageFilter(ids=(number,)), now(), reason=REASON)).done == (
            number,
        )
        assert door.value("SELECT state FROM messages") == "unhandled"

    def test_what_is_still_bad_stays(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """A message that is still not valid stays in quarantine, with its current reason."""
        (number,) = arrive(door, ledger, b'{"Meta": 3}')
        door.rows("UPDATE messages SET quarantine_reason = 'of_an_older_version'")
        batch = only_batch(message_corrections.release(MessageFilter(state="quarantined"), now(), reason=REASON))
        assert whys(batch) == ["stays in quarantine: meta_not_object"]
        assert door.rows("SELECT state, quarantine_reason FROM messages") == [("quarantined", "meta_not_object")]
        assert number == batch.last

    @pytest.fixture
    def unreadable(self, door: Door) -> Callable[[bytes], Any]:
        """Return a message that was unreadable for an earlier release."""
        return lambda content: structs.replace(door.admit(content), message=None, quarantine="not_json")

    def test_what_can_be_read_by_now_is_as_if_it_had_been(
        self,
        door: Door,
        ledger: MessageLedger,
        message_corrections: MessageCorrections,
        engine: Engine,
        keyring: Keyring,
        unreadable: Callable[[bytes], Any],
    ) -> None:
        """The columns of a message that can be read now are filled, its row is signed again, and repeats are
        recognized.
        """
        door.enable()
        ledger.accept(unreadable(body("log-1"))).result(30)

        carry_out(message_corrections.release(MessageFilter(state="quarantined"), now(), reason=REASON))

        (row,) = door.rows("SELECT kind, log_id, source_id, state FROM messages")
        assert tuple(row) == ("PatientAdmin.Arrival", "log-1", SOURCE, "accepted")
        with engine.connect() as connection:
            assert verify.verify(connection, keyring, payloads=True).first_bad is None
        assert ledger.accept(door.admit(body("log-1"))).result(30).outcome == "duplicate"
        assert delivery_states(door) == ["pending"]

    def test_what_came_again_meanwhile_is_not_handled_twice(
        self,
        door: Door,
        ledger: MessageLedger,
        message_corrections: MessageCorrections,
        unreadable: Callable[[bytes], Any],
    ) -> None:
        """If the same message was accepted since, the one in quarantine stays there."""
        door.enable()
        first = ledger.accept(unreadable(body("log-1"))).result(30).message_id
        arrive(door, ledger, body("log-1"))

        batch = only_batch(message_corrections.release(MessageFilter(ids=(first,)), now(), reason=REASON))
        assert "received again" in whys(batch)[0]
        assert delivery_states(door) == ["pending"]

    def test_a_row_that_was_changed_is_not_signed(
        self,
        door: Door,
        ledger: MessageLedger,
        message_corrections: MessageCorrections,
        unreadable: Callable[[bytes], Any],
    ) -> None:
        """A message whose row's MAC does not hold is left unchanged, and not signed again."""
        ledger.accept(unreadable(body("log-1"))).result(30)
        door.rows("UPDATE messages SET peer = '198.51.100.7'")
        assert (
            "audit verify"
            in whys(only_batch(message_corrections.release(MessageFilter(state="quarantined"), now(), reason=REASON)))[
                0
            ]
        )

    def test_a_query_is_nobodys_by_now(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """An unreadable query cannot be released, because its sender no longer waits."""
        again = b', "Meta": {"DataModel": "PatientSearch", "EventType": "Query"}}'
        content = body(kind="PatientSearch.Query")[:-1] + again
        arrive(door, ledger, content)
        assert (
            "query"
            in whys(only_batch(message_corrections.release(MessageFilter(state="quarantined"), now(), reason=REASON)))[
                0
            ]
        )

    def test_only_from_quarantine(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """An accepted message can be neither released nor discarded."""
        (number,) = arrive(door, ledger, body())
        for work in (
            message_corrections.release(MessageFilter(ids=(number,)), now(), reason=REASON),
            message_corrections.discard(MessageFilter(ids=(number,)), now(), reason=REASON),
        ):
            assert whys(only_batch(work)) == ["is not in quarantine"]


class TestDiscard:
    def test_it_is_given_up_and_kept(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """A discarded message is no longer in quarantine; its bytes are kept."""
        (number,) = arrive(door, ledger, b"no json")
        assert only_batch(
            message_corrections.discard(MessageFilter(quarantine_reason="not_json"), now(), reason=REASON)
        ).done == (number,)
        assert door.value("SELECT state FROM messages") == "discarded"
        assert door.value("SELECT count(*) FROM payloads") == 1
