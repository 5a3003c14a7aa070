"""Queries of messages."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from receiver.errors import IntegrityError, NotFound
from receiver.keyring import Keyring
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.operations import queries
from receiver.storage.operations.queries import MessageFilter
from tests.storage.door import DESTINATION, SOURCE, Door, body
from tests.storage.hand import arrive


class TestMessages:
    def test_pages_are_whole(self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]) -> None:
        """Each message is on one page, newest first, while others arrive."""
        numbers = arrive(door, ledger, *(body(f"log-{each}") for each in range(5)))
        first = ask(queries.messages, MessageFilter(), limit=2)
        arrive(door, ledger, body("new"))
        second = ask(queries.messages, MessageFilter(), before=first[-1]["id"], limit=2)
        third = ask(queries.messages, MessageFilter(), before=second[-1]["id"], limit=2)
        assert [each["id"] for each in (*first, *second, *third)] == numbers[::-1]

    @pytest.mark.parametrize(
        ("where", "found"),
        [
            ({"kind": "Results.New"}, 1),
            ({"state": "quarantined"}, 1),
            ({"quarantine_reason": "not_json"}, 1),
            ({"source_id": SOURCE}, 2),
            ({"destination": DESTINATION}, 3),
            ({"kind": "Results.New", "state": "quarantined"}, 0),
            ({"since": datetime(2020, 1, 1, tzinfo=UTC)}, 3),
            ({"since": datetime(2999, 1, 1, tzinfo=UTC)}, 0),
        ],
    )
    def test_filters(
        self, door: Door, ledger: MessageLedger, ask: Callable[..., Any], where: dict[str, Any], found: int
    ) -> None:
        """Each filter is a column; all that are given must hold."""
        arrive(door, ledger, body("1"), body("2", kind="Results.New"), b"no json")
        assert len(ask(queries.messages, MessageFilter(**where), limit=9)) == found

    def test_by_id_and_by_uuid(self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]) -> None:
        """A message is found by its id or its uuid, and shows whether its bytes are kept."""
        (number,) = arrive(door, ledger, body())
        found = ask(queries.message, number)
        assert found == ask(queries.message, found["uuid"])
        assert found["payload"] is True
        door.rows("DELETE FROM payloads")
        assert ask(queries.message, number)["payload"] is False
        for unknown in (999, uuid4()):
            with pytest.raises(NotFound):
                ask(queries.message, unknown)

    def test_the_exact_bytes(
        self, door: Door, ledger: MessageLedger, keyring: Keyring, ask: Callable[..., Any]
    ) -> None:
        """The payload is byte for byte what was received, None if it is purged, and an error if it belongs to another
        message.
        """
        contents = body("1"), body("2")
        one, other = (ask(queries.message, each) for each in arrive(door, ledger, *contents))
        seals, digests = Sealer(keyring), KeyedDigests(keyring)
        assert ask(queries.payload, seals, digests, one) == contents[0]
        with pytest.raises(IntegrityError):
            ask(queries.payload, seals, digests, one | {"uuid": other["uuid"]})
        door.rows("UPDATE messages SET digest = sha256(digest)")
        with pytest.raises(IntegrityError, match="not what was received"):
            ask(queries.payload, seals, digests, one)
        door.rows("DELETE FROM payloads")
        assert ask(queries.payload, seals, digests, one) is None
