"""A world for each test of the handlers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from receiver.keyring import Keyring
from receiver.storage.registration import Registration
from tests.handlers.world import World


@pytest.fixture
def world(database_url: str, engine: Engine, keyring: Keyring, keyring_path: Path, registration: Registration,
          tmp_path: Path) -> Iterator[World]:
    """One database with destination `lab` in it; whatever is started in it ends with the test."""
    made = World(url=database_url, engine=engine, keyring=keyring, keyring_path=keyring_path,
                 registration=registration, directory=tmp_path)
    made.add_destination()
    try:
        yield made
    finally:
        made.end()
