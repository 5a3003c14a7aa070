"""Output of the commands that correct rows: progress by batch, the result, and what was left unchanged.

Must not change anything itself: receiver.storage.operations.corrections does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar

import click

from receiver.cli import output
from receiver.cli.session import Session
from receiver.findings.formatting import count
from receiver.storage.operations.corrections.batches import AuditedCorrections, CorrectionTask

_Corrections = TypeVar("_Corrections", bound=AuditedCorrections)

# The number of unchanged rows that are listed; --json lists all.
MAX_LISTED: Final = 10
_ONE: Final = {"deliveries": "delivery", "messages": "message"}


def corrections(kind: type[_Corrections], session: Session) -> _Corrections:
    """The corrections of one kind of row. The audit log names the actor of the session."""
    return kind(session.engine, session.keyring, actor=session.actor)


def require_selection(empty: bool, filters: str) -> None:
    """Raise UsageError if neither an id nor a filter is given: every row would match. `filters`: examples of them."""
    if empty:
        raise click.UsageError(f"nothing is selected: give IDs, or filters such as {filters}")


def carry_out(
    work: CorrectionTask,
    *,
    what: str,
    verb: str,
    dry_run: bool,
    as_json: bool,
    resume: str = "Repeat the command for the rest.",
) -> None:
    """Do the work and print the result. Exits with status 1 if some rows were left unchanged.

    `what` is "deliveries" or "messages", `verb` the past participle. `resume` tells the operator how to continue after
    an interruption; {last} in it is the last id that was processed.
    """
    done: list[int] = []
    left: list[dict[str, Any]] = []
    lanes: set[str] = set()
    made, newer, last = 0, 0, 0
    try:
        with output.progress(f"{what} {verb}", work.total) as advance:
            for batch in work.batches:
                done += batch.done
                left += [{"id": each.id, "why": each.why} for each in batch.left]
                made, newer, last = made + batch.made, newer + batch.newer, batch.last
                lanes.update(batch.lanes)
                advance(len(batch.done) + len(batch.left))
    except KeyboardInterrupt:
        output.say(
            f"stopped: {count(len(done), _ONE[what], what)} {verb} before the interruption. {resume.format(last=last)}"
        )
        raise
    if as_json:
        output.document(
            {"dry_run": dry_run, "done": done, "left": left, "made": made, "lanes": sorted(lanes), "newer": newer}
        )
    else:
        changed = count(len(done), _ONE[what], what)
        click.echo(
            f"{'would be ' if dry_run else ''}{verb}: {changed} in {count(len(lanes), 'lane', 'lanes')}"
            + (f", {count(made, 'new delivery', 'new deliveries')}" if made else "")
        )
        if newer:
            click.echo(f"newer messages that these lanes have already handled: {newer}")
    list_unchanged(left)


def list_unchanged(left: Sequence[dict[str, Any]]) -> None:
    """List the rows that were left unchanged (their `id`, and `why`). Exits with status 1 if there are any."""
    for each in left[:MAX_LISTED]:
        output.say(f"not changed: {each['id']}: {each['why']}")
    if len(left) > MAX_LISTED:
        output.say(f"not changed: {len(left) - MAX_LISTED} more: --json lists them")
    if left:
        click.get_current_context().exit(1)
