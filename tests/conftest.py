"""What every test may use: a migrated database of its own, a keyring, and a scrubbed environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from sqlalchemy import Engine

from receiver import keyring as keyrings
from receiver.database import migrations
from receiver.database.engine import open_engine
from receiver.keyring import Keyring
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.key_records import record_keys
from tests.support import measuring
from tests.support.postgres import drop_database, new_database, session_cluster

# Where modules are that no test writes.
_LASTING = tuple(f"{place}{os.sep}" for place in (sys.prefix, sys.base_prefix, Path(__file__).parents[1]))


@pytest.fixture(autouse=True, scope="session")
def _measured() -> None:
    """Only those processes are measured that a test wants measured."""
    measuring.keep_to_ourselves()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have what takes minutes begin first, whatever the order is: nothing waits for it in the end."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(autouse=True)
def _scrubbed(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No setting of the machine's reaches a test, no test the settings of the machine, and none another's logging."""
    structlog.reset_defaults()
    for name in os.environ:
        if name.startswith(("RECEIVER_", "PLUGIN_", "PG")) or name == "DATABASE_URL":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.getbasetemp() / "nobody's data"))


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """No module that a test wrote is still imported in the next, which may write another of that name."""
    before = set(sys.modules)
    yield
    for name in sys.modules.keys() - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and not file.startswith(_LASTING):
            del sys.modules[name]


@pytest.fixture(scope="session")
def migrated_database() -> str:
    """The template: one database, migrated once a test process, and never used."""
    session_cluster()
    url = new_database()
    engine = open_engine(url, pooled=False)
    migrations.upgrade(engine)
    return url


@pytest.fixture
def database_url(migrated_database: str) -> Iterator[str]:
    """A fresh, migrated database."""
    url = new_database(migrated_database)
    yield url
    drop_database(url)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on the fresh database."""
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def keyring() -> Keyring:
    """A keyring with a key of each purpose."""
    return keyrings.create(datetime.now(UTC))


@pytest.fixture
def keyring_path(keyring: Keyring, engine: Engine, tmp_path: Path) -> Path:
    """The keyring as a file, its fingerprints on record in the fresh database."""
    path = tmp_path / "keyring.json"
    keyring.save(path)
    with engine.begin() as connection:
        record_keys(connection, keyring)
    return path


@pytest.fixture
def registration(engine: Engine, keyring: Keyring) -> RegistryChanges:
    """The verbs that change the registry, as tester@test."""
    return RegistryChanges(engine, keyring, actor="tester@test")
