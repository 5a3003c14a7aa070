"""The command `status`: shows the state of each feed, and the problems that need an operator.

Must not change anything, or print patient data: operators paste the output into tickets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click

from receiver import findings
from receiver.cli import output, session
from receiver.cli.options import Span, example, json_option

_COLUMNS: Final = ("destination", "feed", "last_200", "refused", "reason", "backlog", "oldest", "dead", "quarantine")
_HOSTS: Final = ("host", "part", "address", "state", "processes", "seen")


@click.command(epilog=example("status", "status --max-age 15m --json"))
@click.option(
    "--max-age",
    type=Span(),
    default="5m",
    show_default=True,
    metavar="DURATION",
    help="Report a finding if a delivery waits longer than DURATION.",
)
@json_option
def status(*, max_age: timedelta, as_json: bool) -> None:
    """Show the state of each feed: one line for each destination, then each finding with the command that fixes it.

    Exit status 1 if a finding is an error. Warnings do not change the exit status.
    """
    with session.opened() as opened, opened.engine.connect() as connection:
        view = findings.read(connection, opened.keyring, max_age=max_age)
        found = findings.collect(view)
    if as_json:
        output.document(
            {
                "destinations": view.feeds,
                "workers": view.workers,
                "listeners": view.listeners,
                "findings": [asdict(each) for each in found],
            }
        )
    else:
        _show(view, found)
    if any(each.severity == "error" for each in found):
        click.get_current_context().exit(1)


def _show(view: findings.View, found: list[findings.Finding]) -> None:
    now = datetime.now(UTC)
    codes = {(each.destination, each.code) for each in found}
    output.rows(
        [_line(each, now, codes) for each in view.feeds],
        _COLUMNS,
        as_json=False,
        nothing="no destination is registered: run `redox-receiver destination add NAME`",
    )
    if view.listeners or view.workers:
        click.echo()
        output.rows([*map(_listener, view.listeners), *map(_worker, view.workers)], _HOSTS, as_json=False, nothing="")
    click.echo()
    for each in found:
        click.secho(output.escaped(each.text), fg="red" if each.severity == "error" else "yellow")
        click.echo(f"  {output.escaped(each.fix)}")
    if not found:
        click.echo("No problems found.")


def _feed(found: Mapping[str, Any], codes: Collection[tuple[str | None, str]]) -> str:
    name = found["destination"]
    if not found["enabled"]:
        return "disabled"
    if found["probably_paused"]:
        return "paused?"
    if (name, "requests_refused") in codes:
        return "refused"
    return "silent" if not found["last_200_at"] or (name, "feed_silent") in codes else "flows"


def _listener(found: Mapping[str, Any]) -> dict[str, Any]:
    state = "running" if found["alive"] else "stopped" if found["stopped"] else "lost"
    return {
        "host": found["host"],
        "part": found["role"],
        "address": found["address"],
        "state": state,
        "processes": found["processes"],
        "seen": found["seen_at"],
    }


def _worker(found: Mapping[str, Any]) -> dict[str, Any]:
    state = "running" if found["alive"] else "lost"
    return {
        "host": found["host"],
        "part": "worker",
        "address": None,
        "state": state,
        "processes": int(found["alive"]),
        "seen": found["seen_at"],
    }


def _line(found: Mapping[str, Any], now: datetime, codes: Collection[tuple[str | None, str]]) -> dict[str, Any]:
    return {
        "destination": found["destination"],
        "feed": _feed(found, codes),
        "last_200": _ago(found["last_200_at"], now),
        "refused": _ago(found["last_refusal_at"], now),
        "reason": found["last_refusal_reason"],
        "backlog": found["backlog"],
        "oldest": _ago(found["oldest_pending_at"], now),
        "dead": sum(row["count"] for row in found["dead"]),
        "quarantine": found["quarantined"],
    }


def _ago(at: datetime | None, now: datetime) -> str | None:
    """Format the time since `at` in its largest unit."""
    if at is None:
        return None
    seconds = max(0, int((now - at).total_seconds()))
    size, unit = next((each for each in ((86_400, "d"), (3_600, "h"), (60, "min")) if seconds >= each[0]), (1, "s"))
    return f"{seconds // size} {unit} ago"
