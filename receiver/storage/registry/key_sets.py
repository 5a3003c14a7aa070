"""Changes to key sets: the public keys that are fetched from a URL (see receiver.storage.registry.jwks_refresher)."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, func, select, update

from receiver.errors import ConfigurationError
from receiver.protocol.jose import read_keys
from receiver.storage import schema
from receiver.storage.registry.transactions import RegistryTransactions


class KeySetChanges(RegistryTransactions):
    """Operations that change key sets."""

    def keys_fetched(self, url: str, document: bytes, now: datetime) -> bool:
        """Store the current content of a key set's URL. Returns whether it has changed. Raises ConfigurationError."""
        read_keys(document)
        with self._engine.begin() as connection:
            row = connection.execute(select(schema.key_sets).where(schema.key_sets.c.url == url)).one_or_none()
            if row is not None and row.document == document:
                connection.execute(
                    update(schema.key_sets)
                    .where(schema.key_sets.c.id == row.id)
                    .values(fetched_at=func.now(), failure=None)
                )
                return False
        with self._change() as connection:
            self._put_key_set(connection, url, document, now)
        return True

    def keys_not_fetched(self, url: str, failure: str) -> None:
        """Record that fetching failed: the keys stay, and `failure` says why."""
        with self._engine.begin() as connection:
            connection.execute(update(schema.key_sets).where(schema.key_sets.c.url == url).values(failure=failure))

    def _need_key_set(self, connection: Connection, url: str, fetched: bytes | None, now: datetime) -> None:
        known = connection.scalar(select(schema.key_sets.c.id).where(schema.key_sets.c.url == url))
        if fetched is not None:
            read_keys(fetched)
            self._put_key_set(connection, url, fetched, now)
        elif known is None:
            raise ConfigurationError(f"the keys at {url} were never fetched")

    def _put_key_set(self, connection: Connection, url: str, document: bytes, now: datetime) -> None:
        table = schema.key_sets
        # The database's clock decides when it is due again, and how old it is.
        times = {"changed_at": now, "fetched_at": func.now(), "tried_at": func.now(), "failure": None}
        row = connection.execute(select(table).where(table.c.url == url)).one_or_none()
        if row is None:
            number = self._insert(connection, table, {"url": url, "document": document} | times)
        else:
            number = row.id
            self._update(connection, table, row, {"document": document} | times)
        self._add_event(
            connection,
            now,
            "key_set.change",
            None,
            f"key_sets:{number}",
            {"url": url, "keys": [key.kid for key in read_keys(document)]},
        )
