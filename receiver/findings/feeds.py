"""Findings about what Redox sends to a destination, and what it is answered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from receiver.findings.finding import Finding, command
from receiver.findings.view import View
from receiver.storage import reading

# Why Redox was refused → the command that lets it in again; {0} is the destination's name.
_FIXES: Final = {
    "source_unknown": ("source", "list", "{0}", "--refused"),
    "source_missing": ("source", "list", "{0}", "--refused"),
    "source_disabled": ("source", "list", "{0}", "--refused"),
    "test_rejected": ("destination", "set", "{0}", "--test-messages", "quarantine"),
    "destination_disabled": ("destination", "enable", "{0}"),
}
_ANY_FIX: Final = ("credential", "list", "{0}")


def fix(reason: str | None, destination: str) -> str:
    """The command that fixes a refusal with that reason."""
    return command(*(word.format(destination) for word in _FIXES.get(reason or "", _ANY_FIX)))


def refusals(view: View) -> Iterator[Finding]:
    """Feeds that Redox has probably paused, and sources that are not registered."""
    for each in view.feeds:
        name = each["destination"]
        if each["probably_paused"]:
            reason = each["last_refusal_reason"]
            yield Finding(code="probably_paused", destination=name, text=f"{name}: Redox was refused ({reason}) and "
                          "has probably paused the feed; it tries again by itself.", fix=fix(reason, name),
                          details={"reason": reason, "last_at": each["last_refusal_at"]})
        elif refused := reading.refused_sources(view.connection, destination=name, limit=1):
            yield Finding(code="sources_refused", destination=name, text=f"{name}: a source that is not registered has "
                          f"sent messages ({refused[0]['reason']}).", fix=command("source", "list", name, "--refused"),
                          details={"reason": refused[0]["reason"], "last_at": refused[0]["last_at"]})


def quarantine(view: View) -> Iterator[Finding]:
    """Messages in quarantine."""
    for each in view.feeds:
        if each["quarantine"]:
            name = each["destination"]
            reasons = ", ".join(f"{row['quarantine_reason']} {row['count']:,}" for row in each["quarantine"])
            yield Finding(code="quarantine", destination=name, text=f"{name}: {each['quarantined']:,} messages are in "
                          f"quarantine ({reasons}).", fix=command("messages", "list", "--state", "quarantined",
                                                                  "--destination", name),
                          details={"count": each["quarantined"], "bytes": each["quarantined_bytes"]})
