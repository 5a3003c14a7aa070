"""Commands that run in this process, on a database with a destination."""

from __future__ import annotations

import json
import os
import pwd
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from receiver.cli import main
from receiver.cli.session import actor
from tests.storage.conftest import door, ledger, open_ledger

__all__ = ["door", "ledger", "open_ledger"]

# The actor that the audit must name.
USER = f"{pwd.getpwuid(os.getuid()).pw_name}@{socket.gethostname()}"
ACTOR = actor()


class Commands:
    """Runs commands, and checks their contract: exit status, one document on stdout, no traceback."""

    def __call__(self, *arguments: str, stdin: str | None = None, status: int = 0) -> Result:
        """Run a command, which must end with that status."""
        done = CliRunner().invoke(main, list(arguments), input=stdin, prog_name="redox-receiver")
        assert done.exit_code == status, f"{arguments}: {done.exit_code}\n{done.output}\n{done.exception!r}"
        return done

    def json(self, *arguments: str, stdin: str | None = None, status: int = 0) -> Any:
        """Run a command with --json, and return the one document that it prints."""
        return json.loads(self(*arguments, "--json", stdin=stdin, status=status).stdout)

    def fails(self, *arguments: str, stdin: str | None = None, status: int = 1) -> str:
        """Run a command that must fail, and return its stderr: one line if the status is 1. Its stdout is empty."""
        done = self(*arguments, stdin=stdin, status=status)
        assert done.stdout == ""
        if status == 1:
            assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr


@pytest.fixture
def run(database_url: str, keyring_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Commands on the fresh database."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("RECEIVER_KEYRING", str(keyring_path))
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(tmp_path / "data"))
    return Commands()


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a plugin: a module, and the entry points that name its functions."""
    where = tmp_path / "site"
    where.mkdir()
    monkeypatch.syspath_prepend(str(where))

    def install(module: str, code: str, *names: str) -> None:
        (where / f"{module}.py").write_text(code)
        if names:
            info = where / f"{module}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
            points = "\n".join(f"{name} = {module}:{name}" for name in names)
            (info / "entry_points.txt").write_text(f"[redox_receiver.handlers]\n{points}\n")

    return install
