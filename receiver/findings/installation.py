"""Findings about the whole installation: clocks, workers, and requests to Redox."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from receiver.database import clock
from receiver.findings.finding import Finding, command
from receiver.findings.view import View
from receiver.storage.operations import outbound_requests, queries

_OUTBOX: Final = {
    "pending": ("outbox_pending", "fail and are tried again ({error})"),
    "held": ("outbox_held", "are held since a restore"),
    "dead": ("outbox_dead", "are dead ({error})"),
}


def clocks(view: View) -> Iterator[Finding]:
    """Compare this host's clock with the database's."""
    ahead = clock.clock_skew(view.connection)
    if ahead is not None and abs(ahead) >= clock.MAX_CLOCK_SKEW:
        yield Finding(
            code="clock",
            text=f"This host's clock is {clock.skew_message(ahead)} the database's, which is "
            f"authoritative: {clock.FIX}.",
            fix=command("check"),
            details={"seconds": ahead.total_seconds()},
        )


def workers(view: View) -> Iterator[Finding]:
    """Find that no worker runs although one is needed."""
    if any(each["alive"] for each in view.workers):
        return
    bound = any(each["enabled"] and each["role"] == "handler" for each in queries.subscriptions(view.connection))
    waiting = outbound_requests.pending(view.connection)
    if bound or waiting:
        yield Finding(
            code="no_worker",
            text="No delivery worker is running: incoming messages wait"
            + (f", and so do {waiting:,} requests to Redox." if waiting else "."),
            fix=command("worker"),
            details={"outbound_pending": waiting},
        )


def outbox(view: View) -> Iterator[Finding]:
    """Find outbound requests that are not sent, for each API key, state and error."""
    for each in outbound_requests.problems(view.connection):
        code, text = _OUTBOX[each["state"]]
        yield Finding(
            code=code,
            text=f"To Redox with {each['api_key']}: {each['count']:,} requests "
            f"{text.format(error=each['error_class'])}.",
            fix=command("outbox", "list", "--key", each["api_key"], "--state", each["state"]),
            details=each,
        )
