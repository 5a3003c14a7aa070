"""Replay guard: remembers nonces for all hosts until they expire.

Must not know what a nonce is made of: it receives a key and a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver.database.engine import describe
from receiver.errors import Unavailable
from receiver.protocol.message import Nonce

log: Final = structlog.get_logger(__name__)

_ROWS: Final = 1_000
# Kept this long after expiry: a host that has not asked the database yet judges expiry by its own clock.
_RETENTION: Final = "1 day"

# If two requests use a nonce at the same moment, the second waits for the first one's commit, and then finds the row.
_REMEMBER: Final = """
INSERT INTO seen_once (key, until)
SELECT key, until FROM unnest(%(keys)s::bytea[], %(until)s::timestamptz[]) AS u(key, until)
ORDER BY key ON CONFLICT DO NOTHING"""
_FORGET: Final = f"""
DELETE FROM seen_once WHERE key IN (
    SELECT key FROM seen_once WHERE until < now() - interval '{_RETENTION}'
    ORDER BY until LIMIT {_ROWS} FOR UPDATE SKIP LOCKED)"""


class ReplayGuard:
    """Remembers nonces through connections of `engine`. Thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def first(self, once: Sequence[Nonce]) -> bool:
        """Return whether all of the nonces are new. After the COMMIT they count as used.

        Raises Unavailable when that cannot be determined now.
        """
        values = {"keys": [each.key for each in once], "until": [each.until for each in once]}
        try:
            with self._engine.begin() as connection:
                return connection.exec_driver_sql(_REMEMBER, values).rowcount == len(once)
        except SQLAlchemyError as exc:
            log.error("once.not_remembered", error=describe(exc))
            raise Unavailable("database_away") from exc


def forget(connection: Connection) -> int:
    """Delete some expired nonces. Returns how many."""
    return connection.exec_driver_sql(_FORGET).rowcount
