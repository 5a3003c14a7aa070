"""What waits for too long is a finding, and so is what no handler takes."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from click.testing import CliRunner

from receiver.cli import main
from tests.findings.conftest import Findings
from tests.support.server import Server
from tests.support.site import Site, sent
from tests.support.waiting import until
from tests.worker.conftest import world
from tests.worker.world import World

__all__ = ["world"]


def late(world: World) -> dict[str, dict[str, Any]]:
    """The findings of `status --max-age 1s`, by code."""
    done = CliRunner().invoke(main, ["status", "--max-age", "1s", "--json"], env=world.environment())
    assert done.exit_code == 1
    return {each["code"]: each for each in json.loads(done.stdout)["findings"]}


def test_deliveries_that_wait(world: World) -> None:
    """Without a worker the backlog grows old; behind a handler that takes its time, the next was never tried."""
    world.enable("patient-one")
    flag = world.directory / "go"
    world.send(f"wait_for:{flag}", "nothing")
    until(lambda: "backlog" in late(world))
    assert "no_worker" in late(world)
    assert "deliveries_never_tried" not in late(world)  # no_worker is the cause
    assert late(world)["backlog"]["text"].startswith("lab: 2 deliveries of patient-one wait, the oldest for ")
    world.start_worker()
    until(
        lambda: (
            "deliveries_never_tried" in late(world)
            and world.rows("SELECT FROM deliveries WHERE started_at IS NOT NULL")
        )
    )
    assert late(world)["deliveries_never_tried"]["details"]["never_tried"] == 1
    assert late(world)["deliveries_never_tried"]["fix"] == (
        "redox-receiver lanes list --handler patient-one --destination lab"
    )
    flag.touch()
    until(lambda: "backlog" not in late(world))


def _accepted(site: Site, server: Server, name: str) -> bool:
    return server.ask(sent(site, to=name)).status == 200


def test_messages_that_no_handler_takes(site: Site, server: Server, found: Findings) -> None:
    """At a production destination they are a finding, by kind; elsewhere they are not."""
    for name, environment in (("try", "staging"), ("real", "production")):
        site.add(name, environment=environment)
    for name in ("try", "real"):
        until(partial(_accepted, site, server, name))
    until(lambda: "unhandled" in found("real"))
    assert found("real")["unhandled"]["details"]["kinds"] == {"PatientAdmin.Arrival": 1}
    assert "unhandled" not in found("try")
    assert found("try")["no_handler"]["severity"] == "warning"
