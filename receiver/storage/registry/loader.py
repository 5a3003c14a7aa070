"""Registry loader: loads the registry as one immutable value, and follows its changes within a second.

Must not change it (see receiver.storage.registry.changes). A row whose MAC fails, or that this version cannot read, is
left out and logged. A row under a key that this host lacks can be neither trusted nor left out, because it may be the
one that makes a request valid: the follower reports doubt until this host has the key.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import structlog
from sqlalchemy import Connection, Engine, Table, func, select
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.clock import Clock
from receiver.database.engine import describe
from receiver.errors import ConfigurationError, ReceiverError, UnknownKey
from receiver.fault_injection import faults
from receiver.keyring import Keyring
from receiver.protocol.jose import read_keys
from receiver.protocol.registry import Credential, Destination, Registry, Subscription
from receiver.protocol.verification import parse_require
from receiver.storage import schema
from receiver.storage.evidence.macs import mac_key, row_mac
from receiver.storage.registry.credentials import CredentialFactory, KeySet, KeySets
from receiver.storage.registry.key_records import check_keys

log: Final = structlog.get_logger(__name__)

POLL_INTERVAL: Final = 0.5
# The tables that `load_registry` reads.
_SIGNED: Final = (
    schema.destinations,
    schema.credentials,
    schema.key_sets,
    schema.sources,
    schema.subscriptions,
    schema.signing_keys,
)
# Seconds between two comparisons of the clocks, because a host's clock may be set.
_COMPARE: Final = 5.0


def load_registry(connection: Connection, keyring: Keyring) -> Registry:
    """Return the current registry. Raises UnknownKey if a row is signed or sealed with a key that this host lacks."""
    version, now = connection.execute(select(schema.registry_version.c.version, func.now())).one()
    destinations = _rows(connection, schema.destinations, keyring)
    of = {
        table.name: _by_destination(_rows(connection, table, keyring))
        for table in (schema.credentials, schema.sources, schema.subscriptions)
    }
    makings, sets = CredentialFactory(keyring), _key_sets(connection, keyring)
    found = {}
    for row in destinations:
        number = row["id"]
        if row["proved"]:
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
                    credentials=tuple(_credentials(of["credentials"][number], makings, sets, now)),
                    # A source whose MAC fails is disabled, not unknown: where any source is accepted, unknown would be
                    # open.
                    sources={each["source_id"]: each["enabled"] and each["proved"] for each in of["sources"][number]},
                    subscriptions=tuple(
                        _subscription(each)
                        for each in of["subscriptions"][number]
                        if each["enabled"] and each["proved"]
                    ),
                )
    # The active key first, then the newest.
    public = sorted(
        (row for row in _rows(connection, schema.signing_keys, keyring) if row["proved"] and row["state"] != "retired"),
        key=lambda row: (row["state"] != "active", -row["id"]),
    )
    return Registry(
        version=version or 0,
        destinations=found,
        public_keys=tuple(row["public_jwk"] for row in public),
        reload_after=makings.reload_after,
    )


def stale_credentials(registry: Registry) -> frozenset[int]:
    """The ids of the credentials whose fetched keys are stale."""
    return frozenset(
        each.id for destination in registry.destinations.values() for each in destination.credentials if each.stale
    )


def _rows(connection: Connection, table: Table, keyring: Keyring) -> list[dict[str, Any]]:
    """Return the rows, each with `proved`: its MAC verifies."""
    rows = [dict(row) for row in connection.execute(select(table).order_by(table.c.id)).mappings()]
    for row in rows:
        row["proved"] = verified_rows(table, row, keyring)
    return rows


def credential_rows(connection: Connection, keyring: Keyring) -> list[dict[str, Any]]:
    """Return the rows of credentials whose MAC verifies, with their stored secrets."""
    return [row for row in _rows(connection, schema.credentials, keyring) if row["proved"]]


def verified_rows(table: Table, row: Mapping[str, Any], keyring: Keyring) -> bool:
    """Return whether the MAC of a registry row verifies. Raises UnknownKey when this host lacks the row's key."""
    holds = bool(row_mac(mac_key(keyring[row["mac_key"]]), table.name, row) == row["mac"])
    if not holds:
        log.error("registry.row_not_proved", table=table.name, row=row["id"])
    return holds


@dataclass(frozen=True, kw_only=True, slots=True)
class UnprovedRow:
    """A row of the registry that is not in force. `key`: the key that this host lacks; None: the row was changed."""

    table: str
    id: int
    destination: str | None
    key: str | None


def unproved_rows(connection: Connection, keyring: Keyring) -> list[UnprovedRow]:
    """Return the rows that this host cannot verify. One under a key that it lacks makes its receivers answer 503."""
    columns = schema.destinations.c
    names: dict[int | None, str] = {row.id: row.name for row in connection.execute(select(columns.id, columns.name))}
    found = []
    for table in _SIGNED:
        for row in connection.execute(select(table).order_by(table.c.id)).mappings():
            destination = names.get(row["id"] if table is schema.destinations else row.get("destination_id"))
            try:
                if not verified_rows(table, {**row}, keyring):
                    found.append(UnprovedRow(table=table.name, id=row["id"], destination=destination, key=None))
            except UnknownKey:
                found.append(UnprovedRow(table=table.name, id=row["id"], destination=destination, key=row["mac_key"]))
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
        if row["proved"]:
            with _left_out_when_unreadable("key_sets", row["id"]):
                sets[row["url"]] = KeySet(keys=read_keys(row["document"]), age=ages[row["id"]])
    return sets


def _credentials(
    rows: Sequence[Mapping[str, Any]], makings: CredentialFactory, sets: KeySets, now: datetime
) -> Iterator[Credential]:
    for row in rows:
        if row["proved"]:
            with _left_out_when_unreadable("credentials", row["id"]):
                yield makings.credential(row, sets, now)


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


class RegistryFollower:
    """Keeps the registry in memory, at most POLL_INTERVAL seconds behind the database; the last one known while that is
    unavailable.

    Each time the version changes, the host's keys are compared with the database's again. If this host lacks one, the
    registry in force stays, and `doubt` names the key, until the keyring file has it. A version older than the one in
    force is not loaded: it would bring back what was revoked since. `clock` is compared with the database's on the way.
    """

    def __init__(self, engine: Engine, keyring: Keyring) -> None:
        self._engine = engine
        self._keyring = keyring
        self._current: Registry | None = None
        self._doubt: str | None = None
        self._went_back = False
        self._reload_at = math.inf
        self.clock: Final = Clock()
        self._compare_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="registry", daemon=True)

    @property
    def current(self) -> Registry | None:
        """The registry, or None until it is loaded."""
        return self._current

    @property
    def doubt(self) -> str | None:
        """Why the registry in force may be out of date, and what to do; None when it is up to date."""
        return self._doubt

    def start(self) -> None:
        """Load once if that works now, then follow. Call it after fork."""
        self._poll()
        self._thread.start()

    def stop(self) -> None:
        """Stop following. Waits briefly for a running query."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2 * POLL_INTERVAL)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_INTERVAL):
            self._poll()

    def _poll(self) -> None:
        try:
            with self._engine.connect() as connection:
                if time.monotonic() >= self._compare_at:
                    self.clock.compare(connection)
                    self._compare_at = time.monotonic() + _COMPARE
                version = connection.scalar(select(schema.registry_version.c.version)) or 0
                if self._current is not None and version < self._current.version:
                    if not self._went_back:
                        log.error("registry.went_back", version=version, in_force=self._current.version)
                    self._went_back = True
                elif (
                    self._current is None
                    or self._doubt is not None
                    or self._went_back
                    or version != self._current.version
                    or time.monotonic() >= self._reload_at
                ):
                    self._load(connection)
        except SQLAlchemyError as exc:
            log.warning("registry.not_read", error=describe(exc))
        except ReceiverError as exc:
            log.error("registry.not_loaded", error=str(exc))
        except Exception as exc:  # noqa: BLE001 - a thread that ends would keep this process at an old registry for ever
            log.error("registry.not_loaded", error=type(exc).__name__)

    def _load(self, connection: Connection) -> None:
        """Load the database's registry. If this host lacks a key for it, keep the one in force and set `doubt`."""
        try:
            check_keys(connection, self._keyring)
            loaded = load_registry(connection, self._keyring)
        except (ConfigurationError, UnknownKey) as exc:
            if str(exc) != self._doubt:
                log.error("registry.in_doubt", error=str(exc))
            self._doubt = str(exc)
            return
        faults.disable_in_production(
            each.name for each in loaded.destinations.values() if each.environment == "production"
        )
        if self._current is not None and loaded.version < self._current.version:
            return  # the version went back between two statements: the next poll reports it
        before = self._current
        self._current, self._doubt, self._went_back = loaded, None, False
        self._reload_at = time.monotonic() + loaded.reload_after
        if before is None or loaded.version != before.version:
            log.info("registry.loaded", version=loaded.version)
        was_stale = frozenset() if before is None else stale_credentials(before)
        for number in sorted(stale_credentials(loaded) - was_stale):
            log.error("key_set.stale", credential=number)
