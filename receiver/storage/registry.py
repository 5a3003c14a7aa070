"""Loads the registry as one immutable value and follows its changes: every process sees one within a second.

May not change it: receiver.storage.registration does. A row whose MAC does not hold, or that this version cannot read,
opens nothing: it is left out, and said so.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import structlog
from sqlalchemy import Connection, Engine, Table, select
from sqlalchemy.exc import SQLAlchemyError

from receiver import failpoints
from receiver.errors import ReceiverError
from receiver.keyring import Keyring
from receiver.protocol.jose import read_keys
from receiver.protocol.registry import Credential, Destination, Registry, Subscription
from receiver.protocol.verification import parse_require
from receiver.storage import schema
from receiver.storage.clock import Clock
from receiver.storage.credentials import KeySets, Makings
from receiver.storage.database import describe
from receiver.storage.evidence import mac_key, row_mac

log: Final = structlog.get_logger(__name__)

POLL: Final = 0.5
# How often the clocks are compared: a host's may be set meanwhile.
_COMPARE: Final = 5.0


def load(connection: Connection, keyring: Keyring) -> Registry:
    """The registry as it stands."""
    version = connection.scalar(select(schema.registry_version.c.version))
    destinations = _rows(connection, schema.destinations, keyring)
    of = {table.name: _by_destination(_rows(connection, table, keyring))
          for table in (schema.credentials, schema.sources, schema.subscriptions)}
    makings, sets = Makings(keyring), _key_sets(connection, keyring)
    found = {}
    for row in destinations:
        number = row["id"]
        if row["proved"]:
            with _left_out_when_unreadable("destinations", number):
                found[row["name"]] = Destination(
                    id=number, name=row["name"], environment=row["environment"], enabled=row["enabled"],
                    require=parse_require(row["require"]), sources_policy=row["sources_policy"],
                    on_unknown_source=row["on_unknown_source"], test_messages=row["test_messages"],
                    credentials=tuple(_credentials(of["credentials"][number], makings, sets)),
                    # One that is not proved is disabled, not unknown: where any source may in, unknown would be open.
                    sources={each["source_id"]: each["enabled"] and each["proved"] for each in of["sources"][number]},
                    subscriptions=tuple(_subscription(each) for each in of["subscriptions"][number]
                                        if each["enabled"] and each["proved"]))
    # The one that signs first, then the newest.
    public = sorted((row for row in _rows(connection, schema.signing_keys, keyring)
                     if row["proved"] and row["state"] != "retired"),
                    key=lambda row: (row["state"] != "active", -row["id"]))
    return Registry(version=version or 0, destinations=found, public_keys=tuple(row["public_jwk"] for row in public))


def _rows(connection: Connection, table: Table, keyring: Keyring) -> list[dict[str, Any]]:
    """The rows, each with whether it is `proved`: its MAC holds."""
    rows = [dict(row) for row in connection.execute(select(table).order_by(table.c.id)).mappings()]
    for row in rows:
        row["proved"] = proved(table, row, keyring)
    return rows


def credential_rows(connection: Connection, keyring: Keyring) -> list[dict[str, Any]]:
    """The rows of credentials that are as we have written them, with what is kept of their secrets."""
    return [row for row in _rows(connection, schema.credentials, keyring) if row["proved"]]


def proved(table: Table, row: Mapping[str, Any], keyring: Keyring) -> bool:
    """Whether a row of the registry is as we have written it."""
    try:
        holds = bool(row_mac(mac_key(keyring[row["mac_key"]]), table.name, row) == row["mac"])
    except ReceiverError:
        holds = False
    if not holds:
        log.error("registry.row_not_proved", table=table.name, row=row["id"])
    return holds


def _by_destination(rows: Sequence[dict[str, Any]]) -> Mapping[int, list[dict[str, Any]]]:
    sorted_out: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        sorted_out[row["destination_id"]].append(row)
    return sorted_out


@contextmanager
def _left_out_when_unreadable(table: str, row: int) -> Iterator[None]:
    """What a later version of this program has written, or another keyring sealed, must not hide all the rest."""
    try:
        yield
    except (ReceiverError, TypeError, ValueError) as exc:
        log.error("registry.row_not_read", table=table, row=row, error=type(exc).__name__)


def _key_sets(connection: Connection, keyring: Keyring) -> KeySets:
    sets = {}
    for row in _rows(connection, schema.key_sets, keyring):
        if row["proved"]:
            with _left_out_when_unreadable("key_sets", row["id"]):
                sets[row["url"]] = read_keys(row["document"])
    return sets


def _credentials(rows: Sequence[Mapping[str, Any]], makings: Makings, sets: KeySets) -> Iterator[Credential]:
    for row in rows:
        if row["proved"]:
            with _left_out_when_unreadable("credentials", row["id"]):
                yield makings.credential(row, sets)


def _subscription(row: Mapping[str, Any]) -> Subscription:
    return Subscription(
        id=row["id"], handler=row["handler"], role=row["role"], patterns=tuple(row["patterns"]),
        ordering=row["ordering"], patient_key=row["patient_key"], acknowledge=row["acknowledge"],
        on_failure=row["on_failure"], max_attempts=row["max_attempts"], timeout=row["timeout"],
        paused=row["paused_at"] is not None)


class RegistryFollower:
    """Keeps the registry in memory, at most POLL seconds behind the database; the last one known while that is away.

    `clock` is compared with the database's on the way.
    """

    def __init__(self, engine: Engine, keyring: Keyring) -> None:
        self._engine = engine
        self._keyring = keyring
        self._current: Registry | None = None
        self.clock: Final = Clock()
        self._compare_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="registry", daemon=True)

    @property
    def current(self) -> Registry | None:
        """The registry, or None as long as it was never loaded."""
        return self._current

    def start(self) -> None:
        """Load once if that works now, then follow. Only after fork."""
        self._poll()
        self._thread.start()

    def stop(self) -> None:
        """Stop following; what is being asked right now is waited for a little."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2 * POLL)

    def _follow(self) -> None:
        while not self._stop.wait(POLL):
            self._poll()

    def _poll(self) -> None:
        try:
            with self._engine.connect() as connection:
                if time.monotonic() >= self._compare_at:
                    self.clock.compare(connection)
                    self._compare_at = time.monotonic() + _COMPARE
                version = connection.scalar(select(schema.registry_version.c.version))
                if self._current is None or version != self._current.version:
                    loaded = load(connection, self._keyring)
                    failpoints.spare(each.name for each in loaded.destinations.values()
                                     if each.environment == "production")
                    self._current = loaded
                    log.info("registry.loaded", version=loaded.version)
        except SQLAlchemyError as exc:
            log.warning("registry.not_read", error=describe(exc))
        except ReceiverError as exc:
            log.error("registry.not_loaded", error=str(exc))
        except Exception as exc:  # noqa: BLE001 - a thread that ends would keep this process at an old registry for ever
            log.error("registry.not_loaded", error=type(exc).__name__)
