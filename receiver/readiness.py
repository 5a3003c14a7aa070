"""Readiness of this host, for the admin listener. Part of the composition root (receiver.app)."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from sqlalchemy import Connection, Engine, func, select, text
from sqlalchemy.exc import SQLAlchemyError

from receiver.database import compatibility
from receiver.database.engine import describe
from receiver.errors import ConfigurationError, ReceiverError
from receiver.keyring import Keyring
from receiver.storage import schema
from receiver.storage.registry import loader
from receiver.storage.registry.key_records import check_keys
from receiver.web.admin import Check

# A worker that was seen within this time runs: workers send heartbeats every few seconds.
_RECENTLY: Final = timedelta(seconds=60)


def readiness(engine: Engine, keyring: Keyring) -> list[Check]:
    """The checks of this host: database, schema, keys, registry, and whether a worker runs.

    The worker's check is always ok, because a receiver without a worker still stores every message. It takes as long as
    the database does.
    """
    try:
        with engine.connect() as connection:
            checks = [_database(connection), _schema(connection)]
            if all(check.ok for check in checks):
                checks += [_keys(connection, keyring), _registry(connection, keyring), _worker(connection)]
            return checks
    except SQLAlchemyError as exc:
        return [Check(name="database", ok=False, detail=f"not reachable ({describe(exc)}): see DATABASE_URL")]


def _database(connection: Connection) -> Check:
    reads_only = connection.scalar(text("SELECT current_setting('transaction_read_only')::boolean"))
    return Check(
        name="database",
        ok=not reads_only,
        detail="reachable, and takes writes"
        if not reads_only
        else "read-only: DATABASE_URL must name the primary server",
    )


def _schema(connection: Connection) -> Check:
    found = compatibility.schema_compatibility(connection)
    return Check(name="schema", ok=found.compatible, detail=found.message)


def _keys(connection: Connection, keyring: Keyring) -> Check:
    try:
        check_keys(connection, keyring)
    except ConfigurationError as exc:
        return Check(name="keys", ok=False, detail=str(exc))
    return Check(name="keys", ok=True, detail=f"{len(keyring.keys)} keys, all of the database's among them")


def _registry(connection: Connection, keyring: Keyring) -> Check:
    try:
        loaded = loader.load_registry(connection, keyring)
    except ReceiverError as exc:
        return Check(name="registry", ok=False, detail=str(exc))
    return Check(name="registry", ok=True, detail=f"version {loaded.version}, {len(loaded.destinations)} destinations")


def _worker(connection: Connection) -> Check:
    silence = connection.scalar(select(func.now() - func.max(schema.workers.c.seen_at)))
    if silence is not None and silence <= _RECENTLY:
        return Check(name="worker", ok=True, detail=f"seen {int(silence.total_seconds())} s ago")
    return Check(
        name="worker", ok=True, detail="none seen lately: messages are kept, and wait; start `redox-receiver worker`"
    )
