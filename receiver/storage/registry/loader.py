"""Registry loader: reads the rows, verifies their MACs, and returns the registry as one immutable value.

Must not change the registry (see receiver.storage.registry.changes). A row whose MAC fails, or that this version cannot
read, is left out and logged. A row under a key that this host lacks raises UnknownKey: it can be neither trusted nor
left out, because it may be the one that makes a request valid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import structlog
from sqlalchemy import Connection, Table, func, select

from receiver.errors import ReceiverError, UnknownKey
from receiver.keyring import Keyring
from receiver.protocol.jose import read_keys
from receiver.protocol.registry import Credential, Destination, Registry, Subscription
from receiver.protocol.verification import parse_require
from receiver.storage import schema
from receiver.storage.evidence.macs import mac_key, row_mac
from receiver.storage.registry.credentials import CredentialFactory, KeySet, KeySets

log: Final = structlog.get_logger(__name__)

# The tables that `load_registry` reads.
_SIGNED: Final = (
    schema.destinations,
    schema.credentials,
    schema.key_sets,
    schema.sources,
    schema.subscriptions,
    schema.signing_keys,
)


def load_registry(connection: Connection, keyring: Keyring) -> Registry:
    """Return the current registry. Raises UnknownKey if a row is signed or sealed with a key that this host lacks."""
    version, now = connection.execute(select(schema.registry_version.c.version, func.now())).one()
    destinations = _rows(connection, schema.destinations, keyring)
    owned = {
        table.name: _by_destination(_rows(connection, table, keyring))
        for table in (schema.credentials, schema.sources, schema.subscriptions)
    }
    factory, sets = CredentialFactory(keyring), _key_sets(connection, keyring)
    found = {}
    for row in destinations:
        number = row["id"]
        if row["verified"]:
            with _left_out_when_unreadable("destinations", number):
                found[row["name"]] = Destination(
                    id=number,
                    name=row["name"],
                    environment=row["environment"],
                    enabled=row["enabled"],
                    require=parse_require(row["require"]),
                    sources_policy=row["sources_policy"],
                    on_unknown_source=row["on_unknown_source"],
                    test_messages=row["test_messages"],
                    credentials=tuple(_credentials(owned["credentials"][number], factory, sets, now)),
                    # A source whose MAC fails is disabled, not unknown: where any source is accepted, unknown would be
                    # open.
                    sources={
                        each["source_id"]: each["enabled"] and each["verified"] for each in owned["sources"][number]
                    },
                    subscriptions=tuple(
                        _subscription(each)
                        for each in owned["subscriptions"][number]
                        if each["enabled"] and each["verified"]
                    ),
                )
    # The active key first, then the newest.
    public = sorted(
        (
            row
            for row in _rows(connection, schema.signing_keys, keyring)
            if row["verified"] and row["state"] != "retired"
        ),
        key=lambda row: (row["state"] != "active", -row["id"]),
    )
    return Registry(
        version=version or 0,
        destinations=found,
        public_keys=tuple(row["public_jwk"] for row in public),
        reload_after=factory.reload_after,
    )


def stale_credentials(registry: Registry) -> frozenset[int]:
    """The ids of the credentials whose fetched keys are stale."""
    return frozenset(
        each.id for destination in registry.destinations.values() for each in destination.credentials if each.stale
    )


def _rows(connection: Connection, table: Table, keyring: Keyring) -> list[dict[str, Any]]:
    """Return the rows, each with `verified`: whether its MAC verifies."""
    rows = [dict(row) for row in connection.execute(select(table).order_by(table.c.id)).mappings()]
    for row in rows:
        row["verified"] = mac_verifies(table, row, keyring)
    return rows


def credential_rows(connection: Connection, keyring: Keyring) -> list[dict[str, Any]]:
    """Return the rows of credentials whose MAC verifies, with their stored secrets."""
    return [row for row in _rows(connection, schema.credentials, keyring) if row["verified"]]


def mac_verifies(table: Table, row: Mapping[str, Any], keyring: Keyring) -> bool:
    """Return whether the MAC of a registry row verifies. Raises UnknownKey when this host lacks the row's key."""
    holds = bool(row_mac(mac_key(keyring[row["mac_key"]]), table.name, row) == row["mac"])
    if not holds:
        log.error("registry.row_not_proved", table=table.name, row=row["id"])
    return holds


@dataclass(frozen=True, kw_only=True, slots=True)
class UnverifiedRow:
    """A row of the registry that is not in force. `key`: the key that this host lacks; None: the row was changed."""

    table: str
    id: int
    destination: str | None
    key: str | None


def unverified_rows(connection: Connection, keyring: Keyring) -> list[UnverifiedRow]:
    """Return the rows that this host cannot verify. One under a key that it lacks makes its receivers answer 503."""
    columns = schema.destinations.c
    names: dict[int | None, str] = {row.id: row.name for row in connection.execute(select(columns.id, columns.name))}
    found = []
    for table in _SIGNED:
        for row in connection.execute(select(table).order_by(table.c.id)).mappings():
            destination = names.get(row["id"] if table is schema.destinations else row.get("destination_id"))
            try:
                if not mac_verifies(table, {**row}, keyring):
                    found.append(UnverifiedRow(table=table.name, id=row["id"], destination=destination, key=None))
            except UnknownKey:
                found.append(UnverifiedRow(table=table.name, id=row["id"], destination=destination, key=row["mac_key"]))
    return found


def _by_destination(rows: Sequence[dict[str, Any]]) -> Mapping[int, list[dict[str, Any]]]:
    sorted_out: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        sorted_out[row["destination_id"]].append(row)
    return sorted_out


@contextmanager
def _left_out_when_unreadable(table: str, row: int) -> Iterator[None]:
    """Leave out one unreadable row, which a later version may have written, instead of failing. UnknownKey passes."""
    try:
        yield
    except UnknownKey:
        raise
    except (ReceiverError, TypeError, ValueError) as exc:
        log.error("registry.row_not_read", table=table, row=row, error=type(exc).__name__)


def _key_sets(connection: Connection, keyring: Keyring) -> KeySets:
    table = schema.key_sets
    # By the database's clock: a host with a wrong clock neither trusts keys for longer nor drops them early.
    age = func.extract("epoch", func.now() - table.c.fetched_at)
    ages = {row.id: float(row.age) for row in connection.execute(select(table.c.id, age.label("age")))}
    sets = {}
    for row in _rows(connection, schema.key_sets, keyring):
        if row["verified"]:
            with _left_out_when_unreadable("key_sets", row["id"]):
                sets[row["url"]] = KeySet(keys=read_keys(row["document"]), age=ages[row["id"]])
    return sets


def _credentials(
    rows: Sequence[Mapping[str, Any]], factory: CredentialFactory, sets: KeySets, now: datetime
) -> Iterator[Credential]:
    for row in rows:
        if row["verified"]:
            with _left_out_when_unreadable("credentials", row["id"]):
                yield factory.credential(row, sets, now)


def _subscription(row: Mapping[str, Any]) -> Subscription:
    return Subscription(
        id=row["id"],
        handler=row["handler"],
        role=row["role"],
        patterns=tuple(row["patterns"]),
        ordering=row["ordering"],
        patient_key=row["patient_key"],
        acknowledge=row["acknowledge"],
        on_failure=row["on_failure"],
        max_attempts=row["max_attempts"],
        timeout=row["timeout"],
        paused=row["paused_at"] is not None,
    )
