"""Findings about the backlog: late deliveries, and messages that no handler takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from receiver.findings.finding import Finding, command
from receiver.findings.formatting import count, span
from receiver.findings.view import View
from receiver.storage.operations import queries


def waiting(view: View) -> Iterator[Finding]:
    """Find deliveries that wait for longer than `max_age`, and those of them that no worker has tried."""
    for feed in view.feeds:
        name, paused = feed["destination"], {each["handler"] for each in feed["paused_handlers"]}
        for each in feed["waiting"]:
            if view.now - each["oldest"] <= view.max_age:
                continue
            listed = command(
                "deliveries", "list", "--state", "pending", "--handler", each["handler"], "--destination", name
            )
            yield Finding(
                code="backlog",
                destination=name,
                text=f"{name}: "
                + count(
                    each["pending"], f"delivery of {each['handler']} waits", f"deliveries of {each['handler']} wait"
                )
                + f", the oldest for {span(view.now - each['oldest'])}.",
                fix=listed,
                details=each,
            )
            untried = each["oldest_never_tried"]
            if each["loaded"] and each["handler"] not in paused and untried and view.now - untried > view.max_age:
                yield Finding(
                    code="deliveries_never_tried",
                    destination=name,
                    text=f"{name}: "
                    + count(
                        each["never_tried"],
                        f"delivery of {each['handler']} was never tried",
                        f"deliveries of {each['handler']} were never tried",
                    )
                    + f", the oldest waits for {span(view.now - untried)}, though a running worker has loaded it.",
                    fix=command("lanes", "list", "--handler", each["handler"], "--destination", name),
                    details=each,
                )


def unhandled(view: View) -> Iterator[Finding]:
    """Find recent messages at production destinations that matched no handler."""
    by_destination = defaultdict[str, list[dict[str, Any]]](list)
    for each in queries.recent_unhandled(view.connection):
        by_destination[each["destination"]].append(each)
    for name, rows in by_destination.items():
        total = sum(each["count"] for each in rows)
        kinds = ", ".join(f"{each['kind']} {each['count']:,}" for each in rows[:3]) + (", …" if rows[3:] else "")
        yield Finding(
            code="unhandled",
            destination=name,
            text=f"{name}: {count(total, 'recent message', 'recent messages')} matched no handler ({kinds}).",
            fix=command("messages", "list", "--state", "unhandled", "--destination", name),
            details={"kinds": {each["kind"]: each["count"] for each in rows}},
        )
