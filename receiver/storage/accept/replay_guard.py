"""What may be used once, remembered for every host until it is good for nothing by itself.

May not know what it is: a key and a time come in.
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
# Kept for so long beyond its time: a host that has not yet asked the database judges by its own clock what is too late.
_BEHIND: Final = "1 day"

# Of two who come at the same moment, the second waits for the first one's commit, and then finds the row.
_REMEMBER: Final = """
INSERT INTO seen_once (key, until)
SELECT key, until FROM unnest(%(keys)s::bytea[], %(until)s::timestamptz[]) AS u(key, until)
ORDER BY key ON CONFLICT DO NOTHING"""
_FORGET: Final = f"""
DELETE FROM seen_once WHERE key IN (
    SELECT key FROM seen_once WHERE until < now() - interval '{_BEHIND}'
    ORDER BY until LIMIT {_ROWS} FOR UPDATE SKIP LOCKED)"""


class ReplayGuard:
    """Remembers, through connections of `engine`. Safe in threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def first(self, once: Sequence[Nonce]) -> bool:
        """Whether none of it was ever seen; from now on, after a COMMIT, all of it was.

        Raises Unavailable when that cannot be known now.
        """
        values = {"keys": [each.key for each in once], "until": [each.until for each in once]}
        try:
            with self._engine.begin() as connection:
                return connection.exec_driver_sql(_REMEMBER, values).rowcount == len(once)
        except SQLAlchemyError as exc:
            log.error("once.not_remembered", error=describe(exc))
            raise Unavailable("database_away") from exc


def forget(connection: Connection) -> int:
    """Delete some of what is over; how many rows."""
    return connection.exec_driver_sql(_FORGET).rowcount
