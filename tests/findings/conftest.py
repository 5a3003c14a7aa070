"""A receiver that really serves, and `status` on its database as an operator reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from receiver.cli import main
from tests.support.site import Site, server, site

__all__ = ["server", "site"]

Findings = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def server_mode() -> str:
    """One server mode is enough: both write what is read here."""
    return "flask"


@pytest.fixture
def found(site: Site) -> Findings:
    """The findings of `status --json` about a destination (None: about the installation), by code."""

    def read(destination: str | None = "lab", *options: str) -> dict[str, dict[str, Any]]:
        done = CliRunner().invoke(main, ["status", "--json", *options], env=site.environment)
        listed = json.loads(done.stdout)["findings"]
        assert done.exit_code == any(each["severity"] == "error" for each in listed)
        return {each["code"]: each for each in listed if each["destination"] == destination}

    return read
