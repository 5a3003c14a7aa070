"""The embedded PostgreSQL of `up`: prepared at the start, and kept running."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Final

import structlog
from sqlalchemy import func, select

from receiver import keyring as keyrings
from receiver.cli import session
from receiver.database import migrations
from receiver.database.embedded.cluster import Cluster
from receiver.errors import ReceiverError
from receiver.settings import Settings
from receiver.storage import schema
from receiver.storage.registry.key_records import check_keys, record_keys

log: Final = structlog.get_logger(__name__)

# Seconds between two checks of PostgreSQL, and before the next start after a failed one.
_POLL_INTERVAL: Final = 1.0
_PAUSE: Final = 10.0


def prepare_own_database(settings: Settings) -> None:
    """Migrate the embedded database to this release, and create its keyring if both are new.

    Raises ConfigurationError when the keyring is missing, or does not match the database.
    """
    with session.database(settings) as engine:
        migrations.upgrade(engine)
        with engine.begin() as connection:
            new = connection.scalar(select(func.count()).select_from(schema.keys)) == 0
            if new and not settings.keyring_path.exists():
                keyrings.create(datetime.now(UTC)).save(settings.keyring_path)
                log.info("up.keyring_made", path=str(settings.keyring_path))
            keyring = keyrings.load_keyring(settings.keyring_path)
            if new:
                record_keys(connection, keyring)
            check_keys(connection, keyring)


class PostgresSupervisor:
    """Supervisor of the embedded PostgreSQL: restarts it when it does not run."""

    def __init__(self, cluster: Cluster | None) -> None:
        self._cluster = cluster
        self._due = time.monotonic()

    def keep(self) -> None:
        """Restart PostgreSQL if it does not run. Checks once every _POLL_INTERVAL seconds."""
        if self._cluster is None or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _POLL_INTERVAL
        try:
            if not self._cluster.running():
                log.error("up.postgres_ended")
                self._cluster.start()
                log.info("up.postgres_started", pid=self._cluster.pid())
        except ReceiverError as exc:
            log.error("up.postgres_not_started", error=str(exc), again_in=_PAUSE)
            self._due = time.monotonic() + _PAUSE
