"""Helpers of the tests of registry changes."""

from __future__ import annotations

from typing import Any

from receiver.storage.registry.credentials import new_token
from tests.storage.door import Door


def version(door: Door) -> int:
    return int(door.value("SELECT version FROM registry_version"))


def audited(door: Door) -> list[tuple[str, str]]:
    return [(row.action, row.subject) for row in door.rows("SELECT action, subject FROM audit_events ORDER BY id")]


def add_destination(door: Door, name: str, **changes: Any) -> int:
    declared: dict[str, Any] = {
        "environment": "staging",
        "require": ["token"],
        "sources_policy": "registered",
        "on_unknown_source": "reject",
        "test_messages": "accept",
        "reply_with": None,
        "token": new_token(),
    }
    return door.registration.add_destination(name, door.now, **declared | changes)
