"""`lanes`: the sequences that deliveries run in, none overtaking another.

May not take a lane from a worker that holds it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import click

from receiver.cli import output
from receiver.cli.correction_output import correction
from receiver.cli.options import destination_option, example, json_option, limit_option, nothing, optional_reason_option
from receiver.cli.session import opened
from receiver.storage.operations import queries

COLUMNS: Final = ("lane", "state", "pending", "head", "oldest_pending_at", "ready_at", "owner")


@click.group()
def lanes() -> None:
    """The sequences that deliveries run in: by handler, destination, and source or patient."""


@lanes.command("list", epilog=example("lanes list --state held"))
@click.option("--handler", metavar="NAME", help="Of this handler.")
@destination_option
@click.option("--state", type=click.Choice(["ready", "running", "waiting", "held", "paused"]), help="In this state.")
@limit_option
@output.columns_option
@json_option
def list_(*, handler: str | None, destination: str | None, state: str | None, limit: int, as_json: bool) -> None:
    """List the lanes in which something waits, runs or is held, the longest waiting first."""
    with opened() as session, session.engine.connect() as connection:
        found = queries.lanes(connection, handler=handler, destination=destination, state=state, limit=limit)
    output.rows(
        found,
        COLUMNS,
        as_json=as_json,
        nothing=nothing(
            {"handler": handler, "destination": destination, "state": state},
            "no lane has work: one is listed while deliveries wait or run in it, or it is held; see `redox-receiver "
            "deliveries list`",
        ),
    )


@lanes.command(epilog=example("lanes release 'register/lab/source:7ce6f387-c33c-417d-8682-81e83628cbd9'"))
@click.argument("lane")
@optional_reason_option()
@json_option
def release(lane: str, *, reason: str | None, as_json: bool) -> None:
    """Let a held LANE go on: the delivery that it is held for runs once more.

    `deliveries skip` gives that delivery up instead, and `deliveries retry` gives it all its attempts again.
    """
    with opened() as session:
        correction(session).release_lane(lane, datetime.now(UTC), reason=reason)
    output.row({"lane": lane, "state": "ready"}, as_json=as_json)
