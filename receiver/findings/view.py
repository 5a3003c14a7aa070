"""What the finders read: the storage's queries, each run once, as of one moment.

Must not hold SQL: the queries are the storage's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from receiver.storage import reading


@dataclass(frozen=True, kw_only=True)
class View:
    """An open connection for further queries, and what several finders share.

    `feeds`: see `reading.feed_status`. `workers`: see `reading.workers`.
    """

    connection: Connection
    feeds: list[dict[str, Any]]
    workers: list[dict[str, Any]]


def read(connection: Connection) -> View:
    """Read the shared part. Raises SQLAlchemyError."""
    return View(connection=connection, feeds=reading.feed_status(connection), workers=reading.workers(connection))
