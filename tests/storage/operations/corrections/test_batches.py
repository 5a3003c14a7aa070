"""What all corrections share: batches, audit rows and dry runs."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest
from sqlalchemy import Engine, text

from receiver.errors import NotFound
from receiver.keyring import Keyring
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence import verify
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.operations import queries
from receiver.storage.operations.corrections import batches
from receiver.storage.operations.corrections.batches import CorrectionBatch, CorrectionTask
from receiver.storage.operations.corrections.delivery_corrections import DeliveryCorrections
from receiver.storage.operations.corrections.lane_corrections import LaneCorrections
from receiver.storage.operations.corrections.message_corrections import MessageCorrections
from receiver.storage.operations.queries import AuditFilter, DeliveryFilter, MessageFilter
from tests.storage.door import Door, body, handler
from tests.storage.hand import LANE, Hand, arrive
from tests.storage.operations.corrections.helpers import (
    REASON,
    carry_out,
    delivery_states,
    fail_next,
    now,
    only_batch,
    whys,
)
from tests.support.waiting import until


def dry_runs(
    delivery_corrections: DeliveryCorrections, message_corrections: MessageCorrections
) -> Iterable[CorrectionTask]:
    """Yield a dry run of each correction of deliveries and messages."""
    messages, deliveries = MessageFilter(destination="clinic"), DeliveryFilter(destination="clinic")
    dead = DeliveryFilter(destination="clinic", state="dead")
    yield delivery_corrections.retry(deliveries, now(), reason=REASON, dry_run=True)
    yield delivery_corrections.skip(dead, now(), reason=REASON, dry_run=True)
    yield message_corrections.replay(messages, now(), reason=REASON, dry_run=True)
    yield message_corrections.release(messages, now(), reason=REASON, dry_run=True)
    yield message_corrections.discard(messages, now(), reason=REASON, dry_run=True)


def snapshot(door: Door) -> list[Any]:
    """Return all rows that corrections change."""
    return [
        door.rows(f"SELECT * FROM {table} ORDER BY 1")
        for table in ("deliveries", "lanes", "messages", "message_keys", "audit_events")
    ]


class TestBatches:
    def test_batches_are_independent(
        self,
        door: Door,
        ledger: MessageLedger,
        delivery_corrections: DeliveryCorrections,
        hand: Hand,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """After an interruption the completed batches stand, and the same command does the rest."""
        monkeypatch.setattr(batches, "ROWS", 2)
        door.enable()
        arrive(door, ledger, *(body(f"log-{each}") for each in range(5)))
        dead = fail_next(hand, 5)
        where = DeliveryFilter(handler="register")

        work = delivery_corrections.retry(where, now(), reason=REASON)
        assert work.total == 5
        assert next(work.batches).done == tuple(dead[:2])
        assert delivery_states(door) == ["pending"] * 2 + ["dead"] * 3

        rest = delivery_corrections.retry(where, now(), reason=REASON)
        assert rest.total == 3
        assert [batch.done for batch in rest.batches] == [(dead[2], dead[3]), (dead[4],)]

    def test_newer_messages_are_counted_once_a_lane(
        self,
        door: Door,
        ledger: MessageLedger,
        delivery_corrections: DeliveryCorrections,
        hand: Hand,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Newer messages of a lane in several batches are counted in the first."""
        monkeypatch.setattr(batches, "ROWS", 1)
        door.enable()
        arrive(door, ledger, *(body(f"log-{each}") for each in range(3)))
        fail_next(hand, 2)
        hand.take().succeed()
        hand.leave()
        done = carry_out(delivery_corrections.retry(DeliveryFilter(handler="register"), now(), reason=REASON))
        assert [batch.newer for batch in done] == [1, 0]

    def test_a_deadlock_is_retried(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, hand: Hand, engine: Engine
    ) -> None:
        """A batch that PostgreSQL ends because of a deadlock is done again."""
        door.enable()
        arrive(door, ledger, body("first"), body("second"))
        dead = fail_next(hand, 2)
        done: list[CorrectionBatch] = []
        lock = text("SELECT id FROM deliveries WHERE id = :id FOR UPDATE")
        with engine.connect() as other:
            other.execute(text("SET deadlock_timeout = '1min'"))  # it is the batch that is found and ended
            other.execute(lock, {"id": dead[1]})
            worker = threading.Thread(
                target=lambda: done.extend(
                    delivery_corrections.retry(DeliveryFilter(state="dead"), now(), reason=REASON).batches
                )
            )
            worker.start()
            until(lambda: door.value("SELECT count(*) FROM pg_locks WHERE NOT granted"), "the batch waits")
            other.execute(lock, {"id": dead[0]})
            other.rollback()
        worker.join(30)
        assert [batch.done for batch in done] == [tuple(dead)]
        assert delivery_states(door) == ["pending", "pending"]

    def test_an_id_that_is_not_there(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections
    ) -> None:
        """If one of several ids does not exist, none is changed."""
        door.enable()
        arrive(door, ledger, body())
        number = door.value("SELECT id FROM deliveries")
        with pytest.raises(NotFound, match="999999"):
            delivery_corrections.skip(DeliveryFilter(ids=(number, 999999)), now(), reason=REASON)
        with pytest.raises(NotFound, match="destination list"):
            delivery_corrections.skip(DeliveryFilter(destination="nowhere"), now(), reason=REASON)
        assert delivery_states(door) == ["pending"]

    def test_a_destination_whose_row_was_changed_gets_nothing(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """The messages of a destination whose row's MAC does not hold are left unchanged."""
        (number,) = arrive(door, ledger, body())
        door.rows("UPDATE destinations SET environment = 'staging'")
        batch = only_batch(message_corrections.replay(MessageFilter(ids=(number,)), now(), reason=REASON))
        assert "audit verify" in whys(batch)[0]


class TestEvidence:
    def test_every_change_has_its_audit_row(
        self,
        door: Door,
        ledger: MessageLedger,
        delivery_corrections: DeliveryCorrections,
        message_corrections: MessageCorrections,
        lane_corrections: LaneCorrections,
        hand: Hand,
        engine: Engine,
        keyring: Keyring,
    ) -> None:
        """Each changed delivery, message and lane has an audit row with the actor, the subject, the message and the
        sealed reason.
        """
        door.enable(handler(on_failure="hold"))
        good, bad = arrive(door, ledger, body("first"), b"no json")
        held = hand.take().fail("pending", lane_state="held")
        lane_corrections.release(LANE, now(), reason=REASON)
        carry_out(delivery_corrections.retry(DeliveryFilter(ids=(held,)), now(), reason=REASON))
        carry_out(delivery_corrections.skip(DeliveryFilter(ids=(held,)), now(), reason=REASON))
        carry_out(message_corrections.replay(MessageFilter(ids=(good,)), now(), reason=REASON))
        carry_out(message_corrections.discard(MessageFilter(ids=(bad,)), now(), reason=REASON))

        with engine.connect() as connection:
            result = queries.audit(connection, AuditFilter(actor="alice@ops1"), limit=10)[::-1]
            assert [(each["action"], each["outcome"], each["subject"]) for each in result] == [
                ("lane.release", "ready", f"lanes:{LANE}"),
                ("delivery.retry", "pending", f"deliveries:{held}"),
                ("delivery.skip", "skipped", f"deliveries:{held}"),
                ("message.replay", "accepted", f"messages:{good}"),
                ("message.discard", "discarded", f"messages:{bad}"),
            ]
            assert all(each["destination"] == "clinic" for each in result)
            uuid = queries.message(connection, good)["uuid"]
            assert [each["message_uuid"] for each in result[1:4]] == [uuid] * 3
            assert {queries.note(connection, Sealer(keyring), each["id"]) for each in result} == {REASON}
            assert verify.verify(connection, keyring).first_bad is None
        assert REASON.encode() not in door.value("SELECT string_agg(note, '') FROM audit_events")

    def test_a_replay_is_linked_to_what_it_repeats(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """The audit row of a replay names the deliveries that it created."""
        (number,) = arrive(door, ledger, body())
        door.enable()
        carry_out(message_corrections.replay(MessageFilter(ids=(number,)), now(), reason=REASON))
        made = door.value("SELECT id FROM deliveries")
        with door.engine.connect() as connection:
            (result,) = queries.audit(connection, AuditFilter(action="message.replay"), limit=2)
        assert result["detail"] == {"deliveries": [made]}

    def test_what_is_left_has_none(
        self, door: Door, ledger: MessageLedger, message_corrections: MessageCorrections
    ) -> None:
        """A row that was left unchanged has no audit row."""
        (number,) = arrive(door, ledger, body())
        carry_out(message_corrections.replay(MessageFilter(ids=(number,)), now(), reason=REASON))
        assert door.value("SELECT count(*) FROM audit_events WHERE actor = 'alice@ops1'") == 0


class TestDryRun:
    def test_it_changes_nothing(
        self,
        door: Door,
        ledger: MessageLedger,
        delivery_corrections: DeliveryCorrections,
        message_corrections: MessageCorrections,
        hand: Hand,
    ) -> None:
        """A dry run of each correction that has something to do changes no row of any table."""
        door.enable()
        arrive(door, ledger, body("first"), body("second"), body("third", Test=True))
        fail_next(hand, 2)
        door.registration.set_destination("clinic", now(), {"test_messages": "accept"})
        before = snapshot(door)
        for work in dry_runs(delivery_corrections, message_corrections):
            assert any(batch.done for batch in work.batches)
        assert snapshot(door) == before

    def test_it_tells_what_will_happen(
        self, door: Door, ledger: MessageLedger, delivery_corrections: DeliveryCorrections, hand: Hand
    ) -> None:
        """A dry run reports exactly what the same command then does, newer messages included."""
        door.enable()
        arrive(door, ledger, *(body(f"log-{each}") for each in range(4)))
        fail_next(hand, 2)
        hand.take().succeed(1)
        hand.leave()
        where = DeliveryFilter(destination="clinic")
        result = carry_out(delivery_corrections.retry(where, now(), reason=REASON, dry_run=True))
        assert result[0].newer == 1
        assert carry_out(delivery_corrections.retry(where, now(), reason=REASON)) == result
