"""Registry follower: keeps the registry in memory and follows its changes within a second.

Must not read rows itself (see receiver.storage.registry.loader).
"""

from __future__ import annotations

import math
import threading
import time
from typing import Final

import structlog
from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.clock import Clock
from receiver.database.engine import describe
from receiver.errors import ConfigurationError, ReceiverError, UnknownKey
from receiver.fault_injection import faults
from receiver.keyring import Keyring
from receiver.protocol.registry import Registry
from receiver.storage import schema
from receiver.storage.registry.key_records import check_keys
from receiver.storage.registry.loader import load_registry, stale_credentials

log: Final = structlog.get_logger(__name__)

# Seconds between two checks of the registry's version.
POLL_INTERVAL: Final = 0.5
# Seconds between two comparisons of the clocks, because a host's clock may be set.
_CLOCK_INTERVAL: Final = 5.0


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
                    self._compare_at = time.monotonic() + _CLOCK_INTERVAL
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
        except Exception as exc:  # noqa: BLE001 - if the thread ended, this process would keep an old registry
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
