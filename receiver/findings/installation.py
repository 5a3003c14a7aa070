"""Findings about the whole installation: clocks, workers, and requests to Redox."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from receiver.database import clock
from receiver.findings.finding import Finding, command
from receiver.findings.formatting import count
from receiver.findings.view import View
from receiver.states import OutboxState
from receiver.storage.operations import outbound_requests, queries

# State → code, and what the requests in it do, for one and for several.
_OUTBOX: Final = {
    "pending": ("outbox_pending", "request fails and is tried again", "requests fail and are tried again"),
    "held": ("outbox_held", "request is held since a restore", "requests are held since a restore"),
    "dead": ("outbox_dead", "request is dead", "requests are dead"),
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
            + (
                f", and so {'does' if waiting == 1 else 'do'} {count(waiting, 'request', 'requests')} to Redox."
                if waiting
                else "."
            ),
            fix=command("worker"),
            details={"outbound_pending": waiting},
        )


def outbox(view: View) -> Iterator[Finding]:
    """Find outbound requests that are not sent, for each API key, state and error."""
    for each in outbound_requests.problems(view.connection):
        code, one, several = _OUTBOX[each["state"]]
        error = "" if each["state"] == OutboxState.HELD else f" ({each['error_class']})"
        yield Finding(
            code=code,
            text=f"To Redox with {each['api_key']}: {count(each['count'], one, several)}{error}.",
            fix=command("outbox", "list", "--key", each["api_key"], "--state", each["state"]),
            details=each,
        )
