"""The last receiver stops: that is a finding, and what it knew of its feeds is kept."""

from __future__ import annotations

from pathlib import Path

from tests.findings.conftest import Findings
from tests.support.server import serving
from tests.support.site import Site, sent
from tests.support.waiting import until


def test_no_receiver(site: Site, found: Findings, tmp_path: Path) -> None:
    """When the last one has stopped, Redox cannot deliver messages."""
    with site.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM listeners")
    assert found(None)["no_receiver"]["text"] == "No receiver is running: Redox cannot deliver messages."
    with serving(tmp_path, site.environment) as only:
        until(lambda: "no_receiver" not in found(None))
        assert only.stop() == 0
    until(lambda: "no_receiver" in found(None))
    assert found(None)["no_receiver"]["fix"] == "redox-receiver up"
    assert "Redox cannot deliver messages, since " in found(None)["no_receiver"]["text"]


def test_when_messages_came_is_kept(site: Site, tmp_path: Path) -> None:
    """In slots of five minutes, at the latest when the receiver stops."""
    site.add("slots")
    with serving(tmp_path, site.environment) as server:
        until(lambda: server.ask(sent(site, to="slots")).status == 200)
        assert server.stop() == 0
    [(age,)] = site.rows(
        "SELECT extract(epoch FROM now() - slot) FROM feed_activity a "
        "JOIN destinations d ON d.id = a.destination_id WHERE d.name = 'slots'"
    )
    assert 0 <= age < 600
