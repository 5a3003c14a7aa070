"""Queries of the audit log."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from receiver.errors import NotFound
from receiver.keyring import Keyring
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.operations import queries
from receiver.storage.operations.queries import AuditFilter
from tests.storage.door import Door, body
from tests.storage.hand import arrive


class TestAudit:
    @pytest.mark.parametrize(
        ("where", "found"),
        [
            ({"action": "destination.add"}, 1),
            ({"action": "message"}, 2),
            ({"action": "mess"}, 0),
            ({"outcome": "accepted"}, 0),
            ({"outcome": "unhandled"}, 1),
            ({"reason": "not_json"}, 1),
            ({"actor": "redox"}, 2),
            ({"actor": "tester@test"}, 2),
            ({"subject": "destinations:1"}, 1),
            ({"destination": "nowhere"}, 0),
            ({"since": datetime(2999, 1, 1, tzinfo=UTC)}, 0),
        ],
    )
    def test_filters(
        self, door: Door, ledger: MessageLedger, ask: Callable[..., Any], where: dict[str, Any], found: int
    ) -> None:
        """Each filter is a column; a subject alone means all of its verbs, and not what begins like it."""
        arrive(door, ledger, body(), b"no json")
        assert len(ask(queries.audit, AuditFilter(**where), limit=9)) == found

    def test_of_one_message(self, door: Door, ledger: MessageLedger, ask: Callable[..., Any]) -> None:
        """All audit rows of a message are listed, newest first, with those of its repeats; `detail` is a value."""
        number, _ = arrive(door, ledger, body(), body())
        uuid = ask(queries.message, number)["uuid"]
        found = ask(queries.audit, AuditFilter(message_uuid=uuid), limit=9)
        assert [each["outcome"] for each in found] == ["duplicate", "unhandled"]
        assert found[0]["detail"]["attempt"] == "log-1-attempt"
        assert ask(queries.audit, AuditFilter(message_uuid=uuid), before=found[0]["id"], limit=9) == found[1:]

    def test_a_reason_that_nobody_gave(self, door: Door, keyring: Keyring, ask: Callable[..., Any]) -> None:
        """A row without a reason has none; a row that does not exist is an error."""
        row = ask(queries.audit, AuditFilter(), limit=1)[0]
        assert row["noted"] is False
        assert ask(queries.note, Sealer(keyring), row["id"]) is None
        with pytest.raises(NotFound):
            ask(queries.note, Sealer(keyring), 999_999)
