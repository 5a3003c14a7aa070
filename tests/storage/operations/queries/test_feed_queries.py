"""Queries of the state of feeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine

from receiver.errors import BadTransfer
from receiver.keyring import Keyring
from receiver.pipeline import HeadAccepted, check_head
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.operations import queries
from receiver.storage.registry.loader import load_registry
from tests.storage.door import DESTINATION, Door, body
from tests.storage.hand import LANE, Hand, arrive
from tests.storage.operations.queries.helpers import STRANGER, now, refuse
from tests.support.waiting import until


class TestFeedStatus:
    @pytest.fixture
    def status(self, ask: Callable[..., Any]) -> Callable[[], dict[str, Any]]:
        """Return the feed status of the destination."""

        def listing() -> dict[str, Any]:
            (found,) = ask(queries.feed_status)
            assert isinstance(found, dict)
            return found

        return listing

    def test_before_anything(self, door: Door, status: Callable[[], dict[str, Any]]) -> None:
        """A destination that has received nothing is not paused."""
        assert status() == {
            "destination": DESTINATION,
            "environment": "production",
            "enabled": True,
            "last_200_at": None,
            "last_refusal_at": None,
            "last_refusal_reason": None,
            "last_refusal_status": None,
            "last_refusal_authentic": False,
            "probably_paused": False,
            "backlog": 0,
            "oldest_pending_at": None,
            "waiting": [],
            "held_lanes": [],
            "paused_handlers": [],
            "unserved": [],
            "dead": [],
            "quarantined": 0,
            "quarantined_bytes": 0,
            "quarantine": [],
        }

    def test_a_refused_feed_is_paused_until_the_next_200(
        self, door: Door, ledger: MessageLedger, status: Callable[[], dict[str, Any]]
    ) -> None:
        """After a refusal with a valid token, Redox has paused the feed; the next accepted message ends that."""
        arrive(door, ledger, body("1"))
        assert status()["probably_paused"] is False
        refuse(door, ledger, body("2", source=STRANGER))
        listing = status()
        assert listing["probably_paused"] is True
        assert (listing["last_refusal_reason"], listing["last_refusal_status"], listing["last_refusal_authentic"]) == (
            "source_unknown",
            403,
            True,
        )
        arrive(door, ledger, body("2"))
        listing = status()
        assert listing["probably_paused"] is False
        assert listing["last_200_at"] > listing["last_refusal_at"]

    def test_a_stranger_pauses_nothing(
        self, door: Door, ledger: MessageLedger, status: Callable[[], dict[str, Any]]
    ) -> None:
        """A wrong token is shown as the last refusal, and does not mean that the feed is paused."""
        refuse(door, ledger, body(), token="a token that nobody ever had")
        listing = status()
        assert listing["last_refusal_reason"] == "token_wrong"
        assert listing["last_refusal_authentic"] is False
        assert listing["probably_paused"] is False

    def test_a_stranger_does_not_hide_a_pause(
        self, door: Door, ledger: MessageLedger, status: Callable[[], dict[str, Any]]
    ) -> None:
        """Wrong tokens after a refusal of Redox do not hide that the feed is paused."""
        refuse(door, ledger, body(source=STRANGER))
        refuse(door, ledger, body(), token="a token that nobody ever had")
        assert status()["probably_paused"] is True

    def test_a_token_that_was_ours_is_redox(
        self, door: Door, ledger: MessageLedger, status: Callable[[], dict[str, Any]], ask: Callable[..., Any]
    ) -> None:
        """A request with a revoked token is from Redox, which has paused the feed."""
        (number,) = (each["id"] for each in ask(queries.credentials))
        door.registration.revoke_credential(number, now())
        refuse(door, ledger, body())
        listing = status()
        assert listing["last_refusal_reason"] == "token_revoked"
        assert listing["probably_paused"] is True

    @pytest.mark.parametrize(
        ("reason", "status_hint", "paused"), [("body_too_large", 413, True), ("body_incomplete", 400, False)]
    )
    def test_a_body_that_is_too_large_is_redox(
        self,
        door: Door,
        ledger: MessageLedger,
        engine: Engine,
        keyring: Keyring,
        status: Callable[[], dict[str, Any]],
        reason: str,
        status_hint: int,
        paused: bool,
    ) -> None:
        """A body that is too large is from Redox, because it was read only after a valid head; one that was cut off may
        be from anyone.
        """
        head = door.admit(body()).inbound.head
        with engine.connect() as connection:
            known = load_registry(connection, keyring)
        accepted = check_head(head, known, door.now)
        assert isinstance(accepted, HeadAccepted)
        ledger.refuse(accepted.not_received(BadTransfer(reason, status_hint=status_hint)))
        until(lambda: status()["last_refusal_reason"] == reason, "audited")
        assert status()["probably_paused"] is paused

    def test_what_waits_and_what_died(
        self, door: Door, ledger: MessageLedger, engine: Engine, status: Callable[[], dict[str, Any]]
    ) -> None:
        """The status shows the backlog and its age, dead deliveries by handler and class, handlers that no worker has
        loaded, held lanes and paused handlers.
        """
        door.enable()
        arrive(door, ledger, *(body(f"log-{each}") for each in range(4)))
        hand = Hand(engine)
        hand.take().fail()
        hand.take().fail()
        hand.take().fail("pending", lane_state="held")
        door.registration.pause_handler("register", now(), destination=None, reason="operator")
        listing = status()
        assert listing["backlog"] == 2
        assert listing["oldest_pending_at"] == door.value(
            "SELECT min(created_at) FROM deliveries WHERE state = 'pending'"
        )
        assert [(each["handler"], each["error_class"], each["count"]) for each in listing["dead"]] == [
            ("register", "KeyError", 2)
        ]
        assert listing["unserved"] == [{"handler": "register", "pending": 2}]
        assert listing["held_lanes"] == [LANE]
        assert [(each["handler"], each["pause_reason"]) for each in listing["paused_handlers"]] == [
            ("register", "operator")
        ]
        door.rows("INSERT INTO workers (name, host, pid, handlers) VALUES ('w', 'h', 1, '{register}')")
        assert status()["unserved"] == []

    def test_what_is_in_quarantine(
        self, door: Door, ledger: MessageLedger, status: Callable[[], dict[str, Any]]
    ) -> None:
        """The status shows count and bytes in quarantine, in total and by reason, without discarded messages."""
        arrive(door, ledger, b"no json", b"nor this", body(Test=True))
        listing = status()
        assert listing["quarantined"] == 3
        assert listing["quarantined_bytes"] == len(b"no json") + len(b"nor this") + len(body(Test=True))
        assert {each["quarantine_reason"]: each["count"] for each in listing["quarantine"]} == {
            "not_json": 2,
            "test_message": 1,
        }
        door.rows("UPDATE messages SET state = 'discarded'")
        assert status()["quarantined"] == 0
