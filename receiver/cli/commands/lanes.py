"""The command group `lanes`: the ordered sequences in which deliveries run.

Must not take a lane from the worker that holds it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import click

from receiver.cli import output
from receiver.cli.correction_output import corrections
from receiver.cli.options import destination_option, example, json_option, limit_option, nothing, optional_reason_option
from receiver.cli.session import opened
from receiver.states import LaneState
from receiver.storage.operations import queries
from receiver.storage.operations.corrections.lane_corrections import LaneCorrections

COLUMNS: Final = ("lane", "state", "pending", "head", "oldest_pending_at", "ready_at", "owner")


@click.group()
def lanes() -> None:
    """List or release lanes: the sequences in which deliveries run, by handler, destination, and source or patient."""


@lanes.command("list", epilog=example("lanes list --state held"))
@click.option("--handler", metavar="NAME", help="Filter by handler.")
@destination_option
@click.option("--state", type=click.Choice(["ready", "running", "waiting", "held", "paused"]), help="Filter by state.")
@limit_option
@output.columns_option
@json_option
def list_(*, handler: str | None, destination: str | None, state: str | None, limit: int, as_json: bool) -> None:
    """List the lanes with deliveries that wait, run or are held. The longest wait is first."""
    with opened() as session, session.engine.connect() as connection:
        found = queries.lanes(connection, handler=handler, destination=destination, state=state, limit=limit)
    output.rows(
        found,
        COLUMNS,
        as_json=as_json,
        nothing=nothing(
            {"handler": handler, "destination": destination, "state": state},
            "no lane has work: a lane is listed while its deliveries wait, run or are held; see `redox-receiver "
            "deliveries list`",
        ),
    )


@lanes.command(epilog=example("lanes release 'register/lab/source:7ce6f387-c33c-417d-8682-81e83628cbd9'"))
@click.argument("lane")
@optional_reason_option()
@json_option
def release(lane: str, *, reason: str | None, as_json: bool) -> None:
    """Release a held LANE: the delivery that holds it runs once more.

    Alternatives: `deliveries skip` skips that delivery, and `deliveries retry` gives it the full number of attempts.
    """
    with opened() as session:
        corrections(LaneCorrections, session).release(lane, datetime.now(UTC), reason=reason)
    output.row({"lane": lane, "state": LaneState.READY}, as_json=as_json)
