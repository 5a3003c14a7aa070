"""Helpers of the tests of queries."""

from __future__ import annotations

from datetime import UTC, datetime

from receiver.storage.accept.ledger import MessageLedger
from tests.storage.door import Door
from tests.support.waiting import until

STRANGER = "22222222-2222-4222-8222-222222222222"


def now() -> datetime:
    """Return the current time."""
    return datetime.now(UTC)


def refuse(door: Door, ledger: MessageLedger, content: bytes, **request: str) -> None:
    """Have a request refused, and wait for its audit row."""
    before = door.value("SELECT count(*) FROM audit_events WHERE action = 'message.refuse'")
    ledger.refuse(door.refuse(content, **request))
    until(lambda: door.value("SELECT count(*) FROM audit_events WHERE action = 'message.refuse'") > before, "audited")
