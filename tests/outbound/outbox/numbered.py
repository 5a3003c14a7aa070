"""Messages that tests tell apart by number."""

from __future__ import annotations

from typing import Any

from tests.outbound.conftest import message
from tests.outbound.outbox.conftest import Desk


def numbered(number: int, to: str = "destination-1") -> dict[str, Any]:
    """Return a message with a number."""
    return {**message(Destinations=[{"ID": to}]), "N": number}


def numbers(desk: Desk) -> list[int]:
    """Return the numbers of the messages that Redox accepted."""
    return [each["N"] for each in desk.api.processed]
