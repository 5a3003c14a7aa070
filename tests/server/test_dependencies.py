"""The undocumented names of gunicorn and uvicorn: the receiver does not start without one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from receiver.server import dependencies
from tests.support.server import serving
from tests.support.site import Site


def test_all_are_there() -> None:
    """In the pinned versions none is missing."""
    assert dependencies.missing() == []


@pytest.mark.parametrize(
    ("module", "owner", "member", "distribution"),
    [
        ("gunicorn.arbiter", "Arbiter", "spawn_worker", "gunicorn"),
        ("uvicorn.server", "Server", "shutdown", "uvicorn"),
        ("uvicorn.protocols.http.httptools_impl", "HttpToolsProtocol", "on_header", "uvicorn"),
    ],
)
def test_one_is_missing(site: Site, tmp_path: Path, module: str, owner: str, member: str, distribution: str) -> None:
    """With a version that lacks it the receiver does not start: one line names the version and the member."""
    (tmp_path / "sitecustomize.py").write_text(f"from {module} import {owner}\ndel {owner}.{member}\n")
    environment = site.environment | {"PYTHONPATH": str(tmp_path)}
    with serving(tmp_path, environment, wait=False) as server:
        assert server.process.wait(60) == 1
        [line] = server.lines("receiver.not_started")
    assert f"{owner}.{member}" in line["error"]
    assert line["error"].startswith(f"{distribution} ")
