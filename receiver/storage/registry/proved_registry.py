"""The proved registry: the registry for requests, available while schema, keys and rows are verified."""

from __future__ import annotations

import threading
from typing import Final

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver.database import compatibility
from receiver.database.compatibility import SchemaMonitor
from receiver.database.engine import describe
from receiver.errors import ConfigurationError
from receiver.keyring import Keyring
from receiver.protocol.registry import Registry
from receiver.storage.registry.follower import RegistryFollower
from receiver.storage.registry.key_records import check_keys

log: Final = structlog.get_logger(__name__)


class ProvedRegistry:
    """The present registry; None while the schema is not compatible, or while this host is not known to hold the
    database's keys.

    Without the keys every token would look wrong, and Redox would get 401 for a mistake of the operator. Raises
    ConfigurationError if the keys of this host are not the database's.
    """

    def __init__(self, engine: Engine, keyring: Keyring, follower: RegistryFollower) -> None:
        self._engine = engine
        self._keyring = keyring
        self._follower = follower
        self._schema = SchemaMonitor(engine)
        self._proved = self._fits = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="schema", daemon=True)
        self._look()

    def __call__(self) -> Registry | None:
        """The registry, or None."""
        if not (self._proved and self._fits) or self._follower.doubt is not None:
            return None
        return self._follower.current

    def start(self) -> None:
        """Start to check periodically. Call it only after fork."""
        self._thread.start()

    def stop(self) -> None:
        """Stop checking; wait for a check that runs."""
        self._stopping.set()
        self._thread.join(compatibility.SCHEMA_POLL_INTERVAL)

    def _look(self) -> None:
        found = self._schema.check()
        if found is not None:  # None: the database is away, so the last result stays
            self._fits = found.compatible
        if found is not None and found.compatible and not self._proved:
            self._proved = self._prove()

    def _prove(self) -> bool:
        try:
            with self._engine.connect() as connection:
                check_keys(connection, self._keyring)
        except SQLAlchemyError as exc:
            log.warning("keys.not_compared", error=describe(exc))
            return False
        return True

    def _watch(self) -> None:
        reported = None
        while not self._stopping.wait(compatibility.SCHEMA_POLL_INTERVAL):
            try:
                self._look()
            except ConfigurationError as exc:
                # Too late to refuse to start: every request gets 503 until the database is the right one.
                if str(exc) != reported:
                    reported = str(exc)
                    log.error("keys.not_proved", error=reported)
            except Exception as exc:  # noqa: BLE001 - without the thread the last result would stay forever
                log.error("schema.not_watched", error=type(exc).__name__)
