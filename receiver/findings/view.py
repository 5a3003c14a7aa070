"""What the finders read: the storage's queries, each run once, as of one moment.

Must not hold SQL: the queries are the storage's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from receiver.keyring import Keyring
from receiver.storage import reading


@dataclass(frozen=True, kw_only=True)
class View:
    """An open connection for further queries, and what several finders share.

    `keyring`: None where there is none to prove rows with. `feeds`: see `reading.feed_status`. `workers`: see
    `reading.workers`.
    """

    connection: Connection
    feeds: list[dict[str, Any]]
    workers: list[dict[str, Any]]
    keyring: Keyring | None = field(default=None, repr=False)


def read(connection: Connection, keyring: Keyring | None) -> View:
    """Read the shared part. Raises SQLAlchemyError."""
    return View(connection=connection, feeds=reading.feed_status(connection), workers=reading.workers(connection),
                keyring=keyring)
