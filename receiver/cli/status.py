"""`status`: do the feeds flow, and what mends what does not.

May not change anything. What it prints is for pasting into a ticket: no patient is in it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import click
from sqlalchemy import Connection

from receiver.cli import output, session
from receiver.cli.options import example, json_option
from receiver.storage import clock, outbound_records, reading

# Why Redox was refused → the command that lets it in again; {0} is the destination's name.
_MENDS: Final = {
    "source_unknown": "source list {0} --refused",
    "source_missing": "source list {0} --refused",
    "source_disabled": "source list {0} --refused",
    "test_rejected": "destination set {0} --test-messages quarantine",
    "destination_disabled": "destination enable {0}",
}
_ANY_MEND: Final = "credential list {0}"

_COLUMNS: Final = ("destination", "feed", "last_200", "refused", "reason", "backlog", "oldest", "dead", "quarantine")


@click.command(epilog=example("status", "status --json"))
@json_option
def status(as_json: bool) -> None:
    """Tell whether the feeds flow: a line for each destination, then each finding with the command that mends it."""
    with session.opened() as opened, opened.engine.connect() as connection:
        destinations = [each | {"findings": list(_findings(connection, each))}
                        for each in reading.feed_status(connection)]
        workers = reading.workers(connection)
        of_all = list(_findings_of_all(connection, workers))
    if as_json:
        output.document({"destinations": destinations, "workers": workers, "findings": of_all})
        return
    now = datetime.now(UTC)
    output.rows([_line(each, now) for each in destinations], _COLUMNS, as_json=False,
                nothing="no destination is registered: redox-receiver destination add NAME")
    findings = of_all + [each for found in destinations for each in found["findings"]]
    click.echo()
    for each in findings:
        click.secho(output.escaped(each["told"]), fg="yellow")
        click.echo(f"  {output.escaped(each['mend'])}")
    if not findings:
        click.echo("Nothing needs you.")


def _feed(found: Mapping[str, Any]) -> str:
    if not found["enabled"]:
        return "disabled"
    if found["probably_paused"]:
        return "paused?"
    return "flows" if found["last_200_at"] else "silent"


def _line(found: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    return {"destination": found["destination"], "feed": _feed(found), "last_200": _ago(found["last_200_at"], now),
            "refused": _ago(found["last_refusal_at"], now), "reason": found["last_refusal_reason"],
            "backlog": found["backlog"], "oldest": _ago(found["oldest_pending_at"], now),
            "dead": sum(row["count"] for row in found["dead"]), "quarantine": found["quarantined"]}


def _ago(at: datetime | None, now: datetime) -> str | None:
    """How long ago, in the largest unit that tells it."""
    if at is None:
        return None
    seconds = max(0, int((now - at).total_seconds()))
    size, unit = next((each for each in ((86_400, "d"), (3_600, "h"), (60, "min")) if seconds >= each[0]), (1, "s"))
    return f"{seconds // size} {unit} ago"


def _finding(name: str, told: str, *command: str) -> dict[str, str]:
    """`command` in pieces; what comes from elsewhere is quoted for the shell."""
    return {"finding": name, "told": told, "mend": " ".join(("redox-receiver", *command))}


def _findings_of_all(connection: Connection, workers: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    ahead = clock.apart(connection)
    if ahead is not None and abs(ahead) >= clock.APART:
        yield _finding("clock", f"This host's clock is {clock.told(ahead)} the database's, by which everything is "
                       f"judged: {clock.MEND}.", "check")
    bound = any(each["enabled"] and each["role"] == "handler" for each in reading.subscriptions(connection))
    if not any(each["alive"] for each in workers):
        waiting = outbound_records.pending(connection)
        if bound or waiting:
            yield _finding("no_worker", "No delivery worker is alive: what comes in waits" + (
                f", and so do {waiting:,} requests to Redox." if waiting else "."), "worker")
    for each in outbound_records.troubles(connection):
        name, error = each["api_key"], each["error_class"]
        what = {"pending": f"do not get out ({error})", "held": "are held since a restore",
                "dead": f"are dead ({error})"}
        yield _finding(f"outbox_{each['state']}", f"To Redox with {name}: {each['count']:,} requests "
                       f"{what[each['state']]}.", "outbox", "list", "--key", shlex.quote(name), "--state",
                       each["state"])


def _findings(connection: Connection, found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    name = found["destination"]
    at = ("--destination", name)
    if found["probably_paused"]:
        reason = str(found["last_refusal_reason"])
        yield _finding(
            "probably_paused", f"{name}: Redox was refused ({reason}) and has probably paused the feed; it tries again "
            "by itself.", _MENDS.get(reason, _ANY_MEND).format(name))
    elif refused := reading.refused_sources(connection, destination=name, limit=1):
        yield _finding("sources_refused", f"{name}: a source that is not registered has sent messages "
                       f"({refused[0]['reason']}).", "source", "list", name, "--refused")
    for lane in found["held_lanes"]:
        yield _finding("lane_held", f"{name}: lane {lane} is held: its first delivery has used up its attempts.",
                       "lanes", "release", shlex.quote(lane), "--reason", "…")
    for each in found["paused_handlers"]:
        yield _finding("handler_paused", f"{name}: {each['handler']} is paused ({each['pause_reason']}).",
                       "handlers", "resume", shlex.quote(each["handler"]), *at)
    for each in found["unserved"]:
        yield _finding("handler_not_loaded", f"{name}: {each['pending']:,} deliveries wait for {each['handler']}, "
                       "which no live worker has loaded.", "handlers", "list")
    for each in found["dead"]:
        yield _finding("dead", f"{name}: {each['count']:,} deliveries of {each['handler']} are dead "
                       f"({each['error_class']}).", "deliveries", "list", "--state", "dead", "--handler",
                       shlex.quote(each["handler"]), "--error-class", shlex.quote(each["error_class"] or ""))
    if found["quarantine"]:
        reasons = ", ".join(f"{each['quarantine_reason']} {each['count']:,}" for each in found["quarantine"])
        yield _finding("quarantine", f"{name}: {found['quarantined']:,} messages are in quarantine ({reasons}).",
                       "messages", "list", "--state", "quarantined", *at)
