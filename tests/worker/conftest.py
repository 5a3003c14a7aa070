"""Worlds for the tests of handlers: one for each test, or one for a module, with a destination for each test."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from textwrap import dedent

import pytest
from sqlalchemy import Engine

from receiver.database.engine import open_engine
from receiver.keyring import Keyring
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.key_records import record_keys
from receiver.worker.handler_process.bootstrap import init_message
from receiver.worker.handler_process.supervisor import HandlerSlot
from tests.support.postgres import drop_database, new_database
from tests.worker.plugin_installation import Install
from tests.worker.worker_processes import stop
from tests.worker.world import World

_numbers = count(1)


@pytest.fixture
def world(
    database_url: str,
    engine: Engine,
    keyring: Keyring,
    keyring_path: Path,
    registration: RegistryChanges,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    """One database with the destination `lab`. Everything started in it ends with the test."""
    made = World(
        url=database_url,
        engine=engine,
        keyring=keyring,
        keyring_path=keyring_path,
        registration=registration,
        directory=tmp_path,
    )
    made.add_destination()
    monkeypatch.setenv("JOURNAL", str(made.journal_path))
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def slot(world: World) -> Iterator[HandlerSlot]:
    """A slot for one handler process in the test's own world."""
    slot = HandlerSlot(lambda: init_message(world.settings(), world.url))
    yield slot
    slot.close()


@pytest.fixture(scope="module")
def shared(migrated_database: str, keyring: Keyring, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world for a whole module."""
    url = new_database(migrated_database)
    engine = open_engine(url)
    directory = tmp_path_factory.mktemp("shared")
    keyring.save(directory / "keyring.json")
    with engine.begin() as connection:
        record_keys(connection, keyring)
    made = World(
        url=url,
        engine=engine,
        keyring=keyring,
        keyring_path=directory / "keyring.json",
        registration=RegistryChanges(engine, keyring, actor="tester@test"),
        directory=directory,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOURNAL", str(made.journal_path))
        try:
            yield made
        finally:
            made.end()
            engine.dispose()
            drop_database(url)


@pytest.fixture(scope="module")
def warm(shared: World) -> Iterator[HandlerSlot]:
    """A slot for one handler process in the module's world, kept from test to test."""
    slot = HandlerSlot(lambda: init_message(shared.settings(), shared.url))
    yield slot
    slot.close()


@pytest.fixture
def place(shared: World) -> str:
    """The name of a destination in the module's world that only this test uses, with its lanes."""
    name = f"d{next(_numbers)}"
    shared.add_destination(name)
    return name


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that installs a distribution with one module and its entry points, as pip does."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(distribution: str, module: str, source: str, **points: str) -> None:
        (tmp_path / f"{module}.py").write_text(dedent(source))
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            "\n".join(["[redox_receiver.handlers]", *(f"{name} = {value}" for name, value in points.items())])
        )
        importlib.invalidate_caches()

    return put


@pytest.fixture(scope="module")
def working(shared: World) -> Iterator[World]:
    """The module's world, with one worker that pauses a handler after three dead deliveries."""
    process = shared.start_worker(RECEIVER_CONCURRENCY="2", RECEIVER_PAUSE_AFTER_DEAD="3")
    yield shared
    stop(process)
