"""Findings about feeds: the requests that Redox sends to a destination, and their answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, Final

from receiver.findings.finding import Finding, command
from receiver.findings.formatting import at, count, span
from receiver.findings.view import View
from receiver.protocol.tokens import DENIAL_REASONS
from receiver.protocol.verification import reason_meanings
from receiver.storage.operations import queries
from receiver.storage.queue import maintenance

# A silence is unusual when it is this many times as long as the longest of the last days, and at least this long. A
# feed with a shorter history is not judged.
_UNUSUAL: Final = 1.5
_LEAST_SILENCE: Final = timedelta(minutes=30)
_LEAST_HISTORY: Final = timedelta(days=1)
# This many refusals are a pattern.
_MANY_REFUSALS: Final = 3

_REFUSED_SOURCES: Final = ("source", "list", "{0}", "--refused")
_NEW_TOKEN: Final = ("credential", "add", "{0}", "--kind", "token")
_REFUSED: Final = ("audit", "list", "--action", "message.refuse", "--destination", "{0}", "--reason-code", "{1}")
_CHECK: Final = ("check",)

# A reason that does not concern a credential → its meaning, and the command that fixes it. {0} is the
# destination's name, {1} the reason.
_REASONS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "source_unknown": ("the source is not registered", _REFUSED_SOURCES),
    "source_missing": ("the message names no source", _REFUSED_SOURCES),
    "source_disabled": ("the source is disabled", _REFUSED_SOURCES),
    "test_rejected": (
        "test messages are rejected here",
        ("destination", "set", "{0}", "--test-messages", "quarantine"),
    ),
    "destination_disabled": ("the destination is disabled", ("destination", "enable", "{0}")),
    "destination_unknown": ("there is no destination of that name", ("destination", "list")),
    "body_too_large": ("the body is larger than RECEIVER_MAX_BODY: raise it and restart", _REFUSED),
    "quarantine_full": (
        "the quarantine of this destination is full: release or discard messages",
        ("messages", "list", "--state", "quarantined", "--destination", "{0}"),
    ),
    "not_handled_yet": (
        'a handler with acknowledge="after_handling" has not succeeded',
        ("deliveries", "list", "--state", "pending", "--destination", "{0}"),
    ),
}
_LIST_CREDENTIALS: Final = ("credential", "list", "{0}")
_SHOW_DESTINATION: Final = ("destination", "show", "{0}")
# A reason of a refused credential → the command that fixes it; any other: _LIST_CREDENTIALS.
_CREDENTIAL_FIXES: Final[Mapping[str, tuple[str, ...]]] = {
    "token_wrong": _NEW_TOKEN,
    "token_expired": _NEW_TOKEN,
    "token_revoked": _NEW_TOKEN,
    "credential_missing": _SHOW_DESTINATION,
    "credential_insufficient": _SHOW_DESTINATION,
    "bearer_differs": _SHOW_DESTINATION,
}


def _explain(reason: str, status: int | None, destination: str) -> tuple[str, str]:
    """Return what a reason means, and the command that fixes it."""
    credentials = reason_meanings() | DENIAL_REASONS
    if reason in _REASONS:
        meaning, words = _REASONS[reason]
    elif status == 503:
        meaning, words = "the receiver could not process it", _CHECK
    elif reason in credentials:
        meaning, words = credentials[reason], _CREDENTIAL_FIXES.get(reason, _LIST_CREDENTIALS)
    elif status == 401:
        meaning, words = "the presented credential does not verify", _LIST_CREDENTIALS
    else:
        meaning, words = "the audit log lists each of them", _REFUSED
    return meaning, command(*(word.format(destination, reason) for word in words))


def refusals(view: View) -> Iterator[Finding]:
    """Find probably paused feeds, destinations whose recent requests are mostly refused, and unregistered sources."""
    for each in view.feeds:
        name = each["destination"]
        found = list(_refused(name, queries.recent_refusals(view.connection, name)))
        if each["probably_paused"]:
            reason = each["last_refusal_reason"]
            meaning, fix = _explain(reason, each["last_refusal_status"], name)
            yield Finding(
                code="probably_paused",
                destination=name,
                text=f"{name}: Redox was refused ({reason}) and "
                f"has probably paused the feed; it retries by itself. Cause: {meaning}.",
                fix=fix,
                details={"reason": reason, "last_at": each["last_refusal_at"]},
            )
        yield from found
        if not (each["probably_paused"] or found) and (
            refused := queries.refused_sources(view.connection, destination=name, limit=1)
        ):
            yield Finding(
                code="sources_refused",
                destination=name,
                text=f"{name}: a source that is not registered has sent messages ({refused[0]['reason']}).",
                fix=command("source", "list", name, "--refused"),
                details={"reason": refused[0]["reason"], "last_at": refused[0]["last_at"]},
            )


def _refused(name: str, rows: list[dict[str, Any]]) -> Iterator[Finding]:
    """Find, for each reason, recent requests of one subject that are mostly refused."""
    for subject, what in (("message", ""), ("token", " for an access token")):
        these = [row for row in rows if row["subject"] == subject]
        if sum(row["since"] for row in these) >= _MANY_REFUSALS:
            which = "since"
        elif (
            these
            and any(row["mixed"] for row in these)
            and (sum(row["window"] for row in these) >= max(_MANY_REFUSALS, these[0]["accepted_window"] + 1))
        ):
            which = "window"
        else:
            continue
        for row in these:
            if row[which]:
                meaning, fix = _explain(row["reason"], row["status"], name)
                first, last, accepted = row[f"{which}_first_at"], row[f"{which}_last_at"], row["last_accepted_at"]
                yield Finding(
                    code="requests_refused",
                    destination=name,
                    fix=fix,
                    text=f"{name}: {count(row[which], f'request{what} was', f'requests{what} were')} refused "
                    f"({row['reason']}) from {at(first)} to {at(last)}, "
                    + (
                        "none was accepted in the last day"
                        if accepted is None
                        else f"the last accepted was at {at(accepted)}"
                    )
                    + f": {meaning}.",
                    details={
                        "subject": subject,
                        "reason": row["reason"],
                        "status": row["status"],
                        "count": row[which],
                        "first_at": first,
                        "last_at": last,
                        "last_accepted_at": accepted,
                    },
                )


def nowhere(view: View) -> Iterator[Finding]:
    """Find requests whose URL names no destination, and those that came before the registry was loaded."""
    for row in queries.recent_refusals(view.connection, None):
        if row["subject"] == "message" and row["window"] >= _MANY_REFUSALS:
            ours = row["status"] == 503
            meaning, fix = _explain(row["reason"], row["status"], "")
            yield Finding(
                code="requests_unavailable" if ours else "destination_unknown",
                severity="error" if ours else "warning",
                text=f"{count(row['window'], 'request was', 'requests were')} refused ({row['reason']}), the last at "
                f"{at(row['window_last_at'])}: {meaning}.",
                fix=fix,
                details={"reason": row["reason"], "count": row["window"], "last_at": row["window_last_at"]},
            )


def silent(view: View) -> Iterator[Finding]:
    """Find feeds that are silent for longer than `destination set --expect-every`, or else than usual."""
    expected = {each["name"]: each for each in queries.destinations(view.connection) if each["enabled"]}
    activity = queries.feed_activity(view.connection, maintenance.ACTIVITY_HISTORY)
    for feed in view.feeds:
        name = feed["destination"]
        last, usual = feed["last_200_at"], activity.get(name)
        if name not in expected:
            continue
        every = expected[name]["expect_every"]
        if every is not None:
            limit, why = timedelta(seconds=every), f"one is expected every {span(timedelta(seconds=every))}"
            last = last or expected[name]["created_at"]
        elif usual is not None and usual["last_at"] - usual["first_at"] >= _LEAST_HISTORY:
            limit = max(_LEAST_SILENCE, usual["longest"] * _UNUSUAL)
            days = maintenance.ACTIVITY_HISTORY.days
            why = f"in {days} days it was never silent for longer than {span(usual['longest'])}"
            last = last or usual["last_at"]
        else:
            continue
        if view.now - last > limit:
            yield Finding(
                code="feed_silent",
                destination=name,
                text=f"{name}: no message for {span(view.now - last)}, since {at(last)}; {why}.",
                fix=command("check", "--url", "…"),
                details={"last_at": last, "limit_seconds": limit.total_seconds(), "expect_every": every},
            )


def quarantine(view: View) -> Iterator[Finding]:
    """Find messages in quarantine."""
    for each in view.feeds:
        if each["quarantine"]:
            name = each["destination"]
            reasons = ", ".join(f"{row['quarantine_reason']} {row['count']:,}" for row in each["quarantine"])
            yield Finding(
                code="quarantine",
                destination=name,
                text=f"{name}: {count(each['quarantined'], 'message is', 'messages are')} in quarantine ({reasons}).",
                fix=command("messages", "list", "--state", "quarantined", "--destination", name),
                details={"count": each["quarantined"], "bytes": each["quarantined_bytes"]},
            )
