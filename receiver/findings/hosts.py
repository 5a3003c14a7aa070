"""Findings about hosts: whether receivers and admin listeners run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from receiver.findings.finding import Finding, Severity, command
from receiver.findings.formatting import at
from receiver.findings.view import View

_STOPPED: Final = {"receiver": "receiver_stopped", "admin": "admin_stopped"}


def receivers(view: View) -> Iterator[Finding]:
    """Find that no receiver runs, and hosts whose receiver or admin listener has stopped."""
    serving = [each for each in view.listeners if each["role"] == "receiver" and each["alive"]]
    if not serving and any(each["enabled"] for each in view.feeds):
        last = max((each["seen_at"] for each in view.listeners if each["role"] == "receiver"), default=None)
        yield Finding(
            code="no_receiver",
            text="No receiver is running: Redox cannot deliver messages"
            + ("." if last is None else f", since {at(last)}."),
            fix=command("up"),
            details={"last_seen_at": last},
        )
    for each in view.listeners:
        if not each["alive"] and not _replaced(each, view.listeners) and (serving or each["role"] == "admin"):
            severity: Severity = "warning" if each["stopped"] or each["role"] == "admin" else "error"
            how = "was stopped" if each["stopped"] else "sends no heartbeats"
            yield Finding(
                code=_STOPPED[each["role"]],
                severity=severity,
                text=f"Host {each['host']}: the {each['role']} at {each['address']} {how} since {at(each['seen_at'])}.",
                fix=command("up"),
                details=each,
            )


def _replaced(stopped: dict[str, Any], listeners: list[dict[str, Any]]) -> bool:
    """Return whether its host serves another address since."""
    return any(
        each["alive"]
        and each["host"] == stopped["host"]
        and each["role"] == stopped["role"]
        and each["started_at"] >= stopped["seen_at"]
        for each in listeners
    )
