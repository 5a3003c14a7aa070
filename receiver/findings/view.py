"""The input of the finders: the storage's queries, each run once, as of one moment.

Must not hold SQL: the queries are in `receiver.storage`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection

from receiver.keyring import Keyring
from receiver.storage.operations import queries
from receiver.storage.queue import maintenance

# How long a delivery may wait, unless the operator sets another limit.
MAX_AGE: Final = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class View:
    """An open connection for further queries, and data that several finders share.

    `keyring`: None if rows cannot be verified. `feeds`: see `queries.feed_status`. `workers`: see
    `queries.workers`. `listeners`: see `queries.listeners`. `now`: by the database's clock. `max_age`: how long a
    delivery may wait.
    """

    connection: Connection
    feeds: list[dict[str, Any]]
    workers: list[dict[str, Any]]
    listeners: list[dict[str, Any]]
    now: datetime
    max_age: timedelta = MAX_AGE
    keyring: Keyring | None = field(default=None, repr=False)


def read(connection: Connection, keyring: Keyring | None, *, max_age: timedelta = MAX_AGE) -> View:
    """Read the shared part. Raises SQLAlchemyError."""
    return View(
        connection=connection,
        feeds=queries.feed_status(connection),
        workers=queries.workers(connection),
        listeners=queries.listeners(connection),
        now=maintenance.now(connection),
        keyring=keyring,
        max_age=max_age,
    )
