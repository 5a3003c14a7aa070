"""A real receiver for each test module, and access to its database."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, text

from receiver.database.engine import open_engine
from receiver.keyring import Keyring, load_keyring
from receiver.storage.evidence.macs import KeyedDigests
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.credentials import new_token
from receiver.storage.registry.key_records import record_keys
from tests.support.postgres import drop_database, new_database
from tests.support.server import Server, post, serving
from tests.support.waiting import until

SOURCE = "7ce6f387-c33c-417d-8682-81e83628cbd9"


@dataclass(kw_only=True)
class Site:
    """A database with destinations, and the environment of a receiver that uses it."""

    engine: Engine
    registration: RegistryChanges
    environment: dict[str, str]
    directory: Path
    tokens: dict[str, str] = field(default_factory=dict, repr=False)

    def add(self, name: str, **policies: Any) -> str:
        """Register a destination with the source SOURCE. Returns its token."""
        values: dict[str, Any] = {
            "environment": "development",
            "require": ["token"],
            "sources_policy": "registered",
            "on_unknown_source": "reject",
            "test_messages": "accept",
            "reply_with": None,
        }
        self.tokens[name] = new_token()
        now = datetime.now(UTC)
        self.registration.add_destination(name, now, token=self.tokens[name], **values | policies)
        self.registration.add_source(name, SOURCE, now, name=None)
        return self.tokens[name]

    def rows(self, sql: str, **values: Any) -> list[Any]:
        """The rows of a query."""
        with self.engine.connect() as connection:
            return list(connection.execute(text(sql), values))

    def count(self, table: str) -> int:
        """How many rows a table has."""
        return int(self.rows(f"SELECT count(*) FROM {table}")[0][0])

    def audit(self, after: datetime, **columns: Any) -> Any:
        """Wait for the first audit row after a moment with these values, and return it."""
        where = "".join(f" AND {name} = :{name}" for name in columns)
        return until(
            lambda: self.rows(
                f"SELECT * FROM audit_events WHERE at > :after{where} ORDER BY id", after=after, **columns
            )
        )[0]

    def digest(self, body: bytes) -> bytes:
        """Return the value of `messages.digest` for a message with this body."""
        return KeyedDigests(load_keyring(self.directory / "keyring.json")).content(body)

    def now(self) -> datetime:
        """Return this moment, for `audit`. Ids would not do: rows of earlier refusals may be written later."""
        return datetime.now(UTC)


@pytest.fixture(scope="module")
def site(migrated_database: str, keyring: Keyring, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A fresh database with one destination, `lab`."""
    directory = tmp_path_factory.mktemp("site")
    url = new_database(migrated_database)
    engine = open_engine(url)
    keyring.save(directory / "keyring.json")
    with engine.begin() as connection:
        record_keys(connection, keyring)
    site = Site(
        engine=engine,
        registration=RegistryChanges(engine, keyring, actor="tester@test"),
        directory=directory,
        environment={"DATABASE_URL": url, "RECEIVER_DATA_DIR": str(directory), "RECEIVER_RECEIVERS": "1"},
    )
    site.add("lab")
    yield site
    engine.dispose()
    drop_database(url)


@pytest.fixture(scope="module", params=["flask", "asgi"])
def server_mode(request: pytest.FixtureRequest) -> str:
    """Each server mode in turn. A module whose facts do not depend on the mode overrides this with one."""
    return str(request.param)


@pytest.fixture(scope="module")
def server(site: Site, server_mode: str) -> Iterator[Server]:
    """A receiver that serves `site`."""
    with serving(site.directory, site.environment | {"RECEIVER_SERVER_MODE": server_mode}) as server:
        yield server


def message(**meta: Any) -> bytes:
    """Return a notification of a patient's arrival, from SOURCE and with new ids unless `meta` says otherwise."""
    return json.dumps(
        {
            "Meta": {
                "DataModel": "PatientAdmin",
                "EventType": "Arrival",
                "Source": {"ID": SOURCE},
                "Logs": [{"ID": str(uuid4()), "AttemptID": str(uuid4())}],
            }
            | meta,
            "Patient": {"Identifiers": []},
        }
    ).encode()


def sent(
    site: Site,
    body: bytes | None = None,
    headers: Mapping[str, str | None] = MappingProxyType({}),
    *,
    to: str = "lab",
    **named: str | None,
) -> bytes:
    """Return the bytes of a request as Redox sends it, with the right token unless `headers` or `named` change it."""
    given = {"verification_token": site.tokens[to], **headers, **named}
    return post(f"/redox/{to}", message() if body is None else body, **given)
