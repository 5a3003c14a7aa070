"""`serve`, `admin` and `worker` run one part alone, under a process manager."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.support.ports import free_port
from tests.support.waiting import until


@pytest.fixture
def _database(database_url: str, keyring_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Settings that name a migrated database, its keyring, and a data directory with nothing in it."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("RECEIVER_KEYRING", str(keyring_path))
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("RECEIVER_RECEIVERS", "1")


@contextmanager
def running(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the command in a process, and kill it afterwards if it still runs."""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "receiver", *arguments],
        cwd=cwd,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    """Return whether the URL answers 200."""
    try:
        with urlopen(url, timeout=30) as answer:
            return bool(answer.status == 200)
    except URLError:
        return False


@pytest.mark.usefixtures("_database")
@pytest.mark.parametrize(
    ("command", "option", "path"), [("serve", "--bind", "/livez"), ("admin", "--admin-bind", "/readyz")]
)
def test_a_listener_alone(tmp_path: Path, command: str, option: str, path: str) -> None:
    """Each listener runs alone at the given address, and ends at SIGTERM."""
    port = free_port()
    with running(command, option, f"127.0.0.1:{port}", cwd=tmp_path) as process:
        until(lambda: answers(f"http://127.0.0.1:{port}{path}"))
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.usefixtures("_database")
def test_relative_paths_are_the_callers(tmp_path: Path, keyring_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is relative to the caller's directory, although gunicorn changes its own."""
    monkeypatch.setenv("RECEIVER_KEYRING", os.path.relpath(keyring_path, tmp_path))
    port = free_port()
    with running("serve", "--bind", f"127.0.0.1:{port}", cwd=tmp_path):
        until(lambda: answers(f"http://127.0.0.1:{port}/livez"))


@pytest.mark.usefixtures("_database")
def test_a_worker_alone(tmp_path: Path) -> None:
    """A worker runs alone, sends heartbeats, and ends at SIGTERM."""
    with running("worker", "--concurrency", "1", cwd=tmp_path) as process:

        def alive() -> bool:
            message = subprocess.run(
                [sys.executable, "-m", "receiver", "check"], capture_output=True, text=True, check=False
            )
            return "workers         1 alive" in message.stdout

        until(alive)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("command", ["serve", "admin", "worker"])
def test_without_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Without DATABASE_URL and without a running `up`, the command fails with one line. Nothing is created."""
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(tmp_path / "data"))
    with running(command, cwd=tmp_path) as process:
        _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = message.splitlines()
    assert "does not run: start `redox-receiver up`, or set DATABASE_URL" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "option"), [("serve", "--bind"), ("admin", "--admin-bind")])
def test_a_wrong_address(tmp_path: Path, command: str, option: str) -> None:
    """An invalid address is an error that names its variable."""
    with running(command, option, "here", cwd=tmp_path) as process:
        _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "write HOST:PORT" in message
