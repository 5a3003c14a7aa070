"""What listens sends heartbeats: `status` and `check` know which hosts serve which address, and which have stopped."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from receiver.cli import main
from tests.findings.conftest import Findings
from tests.support.server import OURS, Server, serving
from tests.support.site import Site, sent
from tests.support.waiting import until

ADMIN = (*OURS, "--workers", "1", "receiver.asgi:admin")


def listeners(site: Site) -> dict[str, dict[str, Any]]:
    """What `status` knows of what listens, by address."""
    done = CliRunner().invoke(main, ["status", "--json"], env=site.environment)
    return {each["address"]: each for each in json.loads(done.stdout)["listeners"]}


def checked(site: Site) -> dict[str, list[str]]:
    """The check of listeners in `check`."""
    done = CliRunner().invoke(main, ["check", "--json"], env=site.environment)
    found: dict[str, list[str]] = {}
    for each in json.loads(done.stdout):
        found.setdefault(each["name"], []).append(each["message"])
    return found


def test_where_a_receiver_listens(site: Site, server: Server) -> None:
    """Not where the settings say by default: where it does."""
    address = f"127.0.0.1:{server.port}"
    until(lambda: address in listeners(site))
    found = listeners(site)[address]
    assert (found["role"], found["host"], found["alive"]) == ("receiver", socket.gethostname(), True)
    assert f"listens at {address}, for a TLS proxy on this host" in checked(site)["listener"]
    assert "does not run here; would listen at 127.0.0.1:8081" in checked(site)["admin_listener"]
    shown = CliRunner().invoke(main, ["status"], env=site.environment).stdout
    assert any(
        line.split()[:4] == [socket.gethostname(), "receiver", address, "running"] for line in shown.splitlines()
    )


def test_a_receiver_that_is_stopped(site: Site, server: Server, found: Findings, tmp_path: Path) -> None:
    """A receiver stopped in order while another serves is a warning with the time; a killed one is an error."""
    until(lambda: "no_receiver" not in found(None))
    with serving(tmp_path, site.environment) as second:
        address = f"127.0.0.1:{second.port}"
        until(lambda: address in listeners(site))
        assert second.stop() == 0
    until(lambda: "receiver_stopped" in found(None))
    finding = found(None)["receiver_stopped"]
    assert finding["severity"] == "warning"
    assert f"the receiver at {address} was stopped since " in finding["text"]
    with site.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM listeners WHERE stopped_at IS NOT NULL")
    with serving(tmp_path, site.environment) as second:
        address = f"127.0.0.1:{second.port}"
        until(lambda: address in listeners(site))
        for each in (*second.workers(), second.process):
            each.send_signal(signal.SIGKILL)
        second.process.wait()
    with site.engine.begin() as connection:  # a minute later
        connection.exec_driver_sql(
            "UPDATE listeners SET started_at = started_at - interval '1 hour', "
            "seen_at = seen_at - CASE address WHEN %s THEN interval '61 seconds' ELSE '0' END",
            (address,),
        )
    assert found(None)["receiver_stopped"]["severity"] == "error"
    assert f"{address} sends no heartbeats since " in found(None)["receiver_stopped"]["text"]


@pytest.mark.usefixtures("server")
def test_an_admin_listener_that_is_stopped(site: Site, found: Findings, tmp_path: Path) -> None:
    """It sends heartbeats as receivers do."""
    with serving(tmp_path, site.environment, arguments=ADMIN) as admin:
        address = f"127.0.0.1:{admin.port}"
        until(lambda: address in listeners(site))
        assert listeners(site)[address]["role"] == "admin"
        assert f"listens at {address}" in checked(site)["admin_listener"]
        assert admin.stop() == 0
    until(lambda: "admin_stopped" in found(None))


def test_a_feed_that_is_silent(site: Site, server: Server, found: Findings) -> None:
    """A feed silent for longer than `destination set --expect-every` is a finding, until a message arrives."""
    site.add("quiet")
    until(lambda: server.ask(sent(site, to="quiet")).status == 200)
    run = CliRunner()
    assert (
        run.invoke(main, ["destination", "set", "quiet", "--expect-every", "10m"], env=site.environment).exit_code == 0
    )
    assert "feed_silent" not in found("quiet")
    run.invoke(main, ["destination", "set", "quiet", "--expect-every", "3s"], env=site.environment)
    until(lambda: "feed_silent" in found("quiet"))
    assert "; one is expected every 3 s." in found("quiet")["feed_silent"]["text"]
    assert run.invoke(main, ["destination", "set", "quiet", "--expect-none"], env=site.environment).exit_code == 0
    assert "feed_silent" not in found("quiet")
    assert (
        run.invoke(
            main, ["destination", "set", "quiet", "--expect-none", "--expect-every", "3s"], env=site.environment
        ).exit_code
        == 2
    )
