"""How commands that put things right tell what they do: batch by batch, and what they left.

May not do any of it: receiver.storage.operations.corrections does.
"""

from __future__ import annotations

from typing import Final

import click

from receiver.cli import output
from receiver.cli.session import Session
from receiver.storage.operations.corrections import Corrections, CorrectionTask

# So many of those that were left are named; --json names all.
TOLD: Final = 10
_ONE: Final = {"deliveries": "delivery", "messages": "message"}


def correction(session: Session) -> Corrections:
    """The verbs, in the name of whoever runs the command."""
    return Corrections(session.engine, session.keyring, actor=session.actor)


def carry_out(work: CorrectionTask, *, what: str, verb: str, dry_run: bool, as_json: bool, resume: str) -> None:
    """Do the work and tell what was done. Exits with 1 when something of it was left.

    `what` is "deliveries" or "messages", `verb` the past participle. `resume`: how one goes on after an interruption;
    {last} in it is the last id that was looked at.
    """
    done: list[int] = []
    left: list[dict[str, object]] = []
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
            f"stopped: {output.count(len(done), _ONE[what], what)} {verb}; what is done stays done. "
            f"{resume.format(last=last)}"
        )
        raise
    if as_json:
        output.document(
            {"dry_run": dry_run, "done": done, "left": left, "made": made, "lanes": sorted(lanes), "newer": newer}
        )
    else:
        told = output.count(len(done), _ONE[what], what)
        click.echo(
            f"{'would be ' if dry_run else ''}{verb}: {told} in {output.count(len(lanes), 'lane', 'lanes')}"
            + (f", {output.count(made, 'new delivery', 'new deliveries')}" if made else "")
        )
        if newer:
            click.echo(f"newer messages already handled in those lanes: {newer}")
    for each in left[:TOLD]:
        output.say(f"left {each['id']}: {each['why']}")
    if len(left) > TOLD:
        output.say(f"left {len(left) - TOLD} more: --json names them")
    if left:
        click.get_current_context().exit(1)
