from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from receiver import keyring as keyrings
from receiver import settings
from receiver.cli import session
from receiver.database import migrations
from receiver.database.embedded.cluster import Cluster
from receiver.database.engine import open_engine
from receiver.errors import ConfigurationError, Unavailable
from tests.cli.conftest import USER, Commands
from tests.support.postgres import drop_database, new_database, open_directory


def test_the_actor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The operating system's user at this host; the user who logged in, where that is another one; and sudo's word."""
    monkeypatch.delenv("SUDO_USER", raising=False)
    login = tmp_path / "loginuid"
    monkeypatch.setattr(session, "_LOGIN_UID", login)
    alone = f"{USER} uid={os.getuid()}"
    assert session.actor() == alone
    for number in (os.getuid(), 2**32 - 1):
        login.write_text(str(number))
        assert session.actor() == alone
    login.write_text("4711")
    assert session.actor() == f"{alone} login_uid=4711"
    monkeypatch.setenv("SUDO_USER", "alice")
    assert session.actor() == f"{alone} login_uid=4711 sudo_user=alice"


def test_the_environment_cannot_change_the_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    """LOGNAME and USER can be set by anybody, and are not used; SUDO_USER must look like an account."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "mallory")
    for value in ("", "a b", "x uid=0", "-x", "ä", "x" * 65):
        monkeypatch.setenv("SUDO_USER", value)
        assert session.actor().startswith(f"{USER} uid={os.getuid()}")
        assert "sudo_user" not in session.actor()


def test_an_unmigrated_database(run: Commands, keyring_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command needs this release's schema, and the error names the command that migrates."""
    url = new_database()
    monkeypatch.setenv("DATABASE_URL", url)
    try:
        with pytest.raises(ConfigurationError, match="redox-receiver db upgrade"), session.opened():
            pass
    finally:
        drop_database(url)


def test_another_keyring(run: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command works with another keyring than the database's: nobody could verify what it writes."""
    keyrings.create(datetime.now(UTC)).save(tmp_path / "other.json")
    monkeypatch.setenv("RECEIVER_KEYRING", str(tmp_path / "other.json"))
    with pytest.raises(ConfigurationError, match="RECEIVER_KEYRING"), session.opened():
        pass


def test_no_server(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that does not answer is a ReceiverError. It names the setting, and not the password."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("DATABASE_URL", f"postgresql://me:hush@127.0.0.1:{taken.getsockname()[1]}/db")
        printed = run.fails("destination", "list")
    assert "DATABASE_URL" in printed
    assert "hush" not in printed


def test_a_database_error_tells_nothing_of_the_row(run: Commands, engine: Engine) -> None:
    """The error has a class and a SQLSTATE, and nothing that PostgreSQL quotes of a row."""
    with pytest.raises(Unavailable) as caught, session.opened() as work, work.engine.begin() as connection:
        connection.execute(text("SELECT CAST('Ada Lovelace' AS integer)"))
    assert "22P02" in str(caught.value)
    assert "Ada" not in str(caught.value)
    assert isinstance(caught.value.__cause__, SQLAlchemyError)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The parent of a data directory."""
    made = open_directory()
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(made / "data"))
    yield made
    shutil.rmtree(made)


def test_the_embedded_database_is_started_and_stopped(root: Path) -> None:
    """Without DATABASE_URL a command starts the embedded PostgreSQL if it does not run, and stops it afterwards."""
    given = settings.load_settings()
    with session.database(given, make=True) as engine:
        migrations.upgrade(engine)
        cluster = Cluster(given.data_dir)
        assert cluster.running()
    assert not cluster.running()
    Commands()("keys", "init")
    assert Commands().json("destination", "list") == []
    assert not cluster.running()
    assert [each.name for each in root.iterdir()] == ["data"]


def test_one_that_runs_is_joined(root: Path) -> None:
    """A cluster that another process uses still runs after the command has ended."""
    given = settings.load_settings()
    cluster = Cluster(given.data_dir)
    with cluster.joined() as url:
        migrations.upgrade(open_engine(url, pooled=False))
        Commands()("keys", "init")
        assert cluster.running()
