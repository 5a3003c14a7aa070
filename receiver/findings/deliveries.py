"""Findings about deliveries: held lanes, paused handlers, dead deliveries."""

from __future__ import annotations

from collections.abc import Iterator

from receiver.findings.finding import Finding, command
from receiver.findings.formatting import count
from receiver.findings.view import View
from receiver.storage.registry.handler_changes import RESTORED


def lanes(view: View) -> Iterator[Finding]:
    """Find held lanes."""
    for feed in view.feeds:
        for lane in feed["held_lanes"]:
            yield Finding(
                code="lane_held",
                destination=feed["destination"],
                text=f"{feed['destination']}: lane {lane} is held: its first delivery has used up its attempts.",
                fix=command("lanes", "release", lane, "--reason", "…"),
                details={"lane": lane},
            )


def handlers(view: View) -> Iterator[Finding]:
    """Find handlers that are paused, or that no running worker has loaded."""
    for feed in view.feeds:
        name = feed["destination"]
        for each in feed["paused_handlers"]:
            if each["pause_reason"] == RESTORED:
                yield Finding(
                    code="deliveries_held",
                    destination=name,
                    text=f"{name}: deliveries of {each['handler']} "
                    "are on hold since a restore: skip those that had run, then let the others run.",
                    fix=command(
                        "deliveries", "resume", "--handler", each["handler"], "--destination", name, "--reason", "…"
                    ),
                    details=each,
                )
                continue
            yield Finding(
                code="handler_paused",
                destination=name,
                text=f"{name}: {each['handler']} is paused ({each['pause_reason']}).",
                fix=command("handlers", "resume", each["handler"], "--destination", name),
                details=each,
            )
        for each in feed["unserved"]:
            yield Finding(
                code="handler_not_loaded",
                destination=name,
                text=f"{name}: {count(each['pending'], 'delivery waits', 'deliveries wait')} for {each['handler']}, "
                "which no running worker has loaded.",
                fix=command("handlers", "list"),
                details=each,
            )


def dead(view: View) -> Iterator[Finding]:
    """Find dead deliveries, for each handler and error."""
    for feed in view.feeds:
        for each in feed["dead"]:
            yield Finding(
                code="dead",
                destination=feed["destination"],
                text=f"{feed['destination']}: "
                + count(
                    each["count"], f"delivery of {each['handler']} is dead", f"deliveries of {each['handler']} are dead"
                )
                + f" ({each['error_class']}).",
                fix=command(
                    "deliveries",
                    "list",
                    "--state",
                    "dead",
                    "--handler",
                    each["handler"],
                    "--error-class",
                    each["error_class"] or "",
                ),
                details=each,
            )
