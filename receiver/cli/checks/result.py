"""The result of a check, and how results are printed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import click

from receiver.cli import output

State = Literal["ok", "warn", "bad"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """The result of one check, and the setting or command that fixes a problem. `name` is a contract."""

    name: str
    state: State
    message: str
    fix: str | None = None


def report(found: Sequence[CheckResult], *, as_json: bool) -> None:
    """Print the results. Exits with status 1 if one is bad."""
    if as_json:
        output.document([asdict(each) for each in found])
    else:
        width = max(len(each.name) for each in found)
        for each in found:
            label = {"ok": "OK", "warn": "WARN", "bad": "BAD"}[each.state]
            colour = {"ok": "green", "warn": "yellow", "bad": "red"}[each.state]
            begin = f"{label:<4}  {each.name:<{width}}  "
            text = output.escaped(each.message) + (f" → {output.escaped(each.fix)}" if each.fix else "")
            room = output.width()
            lines = (
                [text]
                if room is None
                else textwrap.wrap(text, max(20, room - len(begin)), break_long_words=False, break_on_hyphens=False)
            )
            click.echo(click.style(label, fg=colour) + begin[len(label) :] + f"\n{' ' * len(begin)}".join(lines))
    if any(each.state == "bad" for each in found):
        click.get_current_context().exit(1)
