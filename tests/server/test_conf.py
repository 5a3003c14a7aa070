"""deploy/gunicorn.conf.py: gunicorn with this file serves as `serve` does."""

from __future__ import annotations

import json
import runpy
import signal
from pathlib import Path

import pytest

from receiver.server import conf
from tests.support.server import post, serving
from tests.support.site import SOURCE, Site

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "gunicorn.conf.py"


@pytest.mark.parametrize("server_mode", ["flask", "asgi"])
def test_it_serves(site: Site, tmp_path: Path, server_mode: str) -> None:
    """gunicorn with that file accepts and stores a message, and stops in order."""
    body = json.dumps(
        {
            "Meta": {
                "DataModel": "PatientAdmin",
                "EventType": "Arrival",
                "Source": {"ID": SOURCE},
                "Logs": [{"ID": f"by-hand-{server_mode}"}],
            }
        }
    ).encode()
    environment = site.environment | {"RECEIVER_SERVER_MODE": server_mode}
    with serving(tmp_path, environment, arguments=("-c", str(CONFIGURATION))) as server:
        assert server.ask(post("/redox/lab", body, verification_token=site.tokens["lab"])).status == 200
        assert server.stop(signal.SIGTERM) == 0
        assert server.lines()  # every line is JSON
    assert site.rows("SELECT count(*) FROM messages WHERE log_id = :id", id=f"by-hand-{server_mode}")[0][0] == 1


def test_it_is_ours(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has every setting of receiver.server.conf, unchanged: its comments hold for `serve` too."""
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    theirs = runpy.run_path(str(CONFIGURATION))
    ours = {name for name in vars(conf) if not name.startswith("_") and name.islower()}
    assert {"workers", "threads", "keepalive", "worker_class", "worker_tmp_dir"} <= ours
    assert {name for name in ours if theirs.get(name) != getattr(conf, name)} == set()
