"""Fixtures for every test: a migrated database of its own, a keyring, and a clean environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import hypothesis
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

# A deadline for each example measures the machine, which other tests use too, and not the code.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")

# Where the modules are that tests do not write.
_LASTING = tuple(f"{place}{os.sep}" for place in (sys.prefix, sys.base_prefix, Path(__file__).parents[1]))


@pytest.fixture(autouse=True, scope="session")
def _measured() -> None:
    """Measure only the processes that a test wants measured."""
    measuring.keep_to_ourselves()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that take minutes first, in any order of the others: nothing waits for them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(autouse=True)
def _scrubbed(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Remove the machine's settings, keep its data directory out of reach, and reset the logging of earlier tests."""
    structlog.reset_defaults()
    for name in os.environ:
        if name.startswith(("RECEIVER_", "PLUGIN_", "PG", "PROMETHEUS_")) or name == "DATABASE_URL":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.getbasetemp() / "nobody's data"))


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Forget the modules that a test wrote: the next one may write another of the same name."""
    before = set(sys.modules)
    yield
    for name in sys.modules.keys() - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and not file.startswith(_LASTING):
            del sys.modules[name]


@pytest.fixture(scope="session")
def migrated_database() -> str:
    """The template: one database for each test process, migrated and never used."""
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
    """The keyring as a file. Its fingerprints are in the fresh database."""
    path = tmp_path / "keyring.json"
    keyring.save(path)
    with engine.begin() as connection:
        record_keys(connection, keyring)
    return path


@pytest.fixture
def registration(engine: Engine, keyring: Keyring) -> RegistryChanges:
    """The functions that change the registry, as tester@test."""
    return RegistryChanges(engine, keyring, actor="tester@test")
