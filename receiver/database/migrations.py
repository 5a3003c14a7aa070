"""Schema migrations: `upgrade` runs under an advisory lock, one transaction for each step, without blocking the feed.

A step that waits for a lock blocks every later request for it. So a step waits only briefly, for less than a request's
timeout, then gives up, lets the others pass and tries again. migrations/script.py.mako has the rules for revisions.

Must not define tables (see receiver.storage.schema) or steps (see the revisions), nor judge the schema (see
receiver.database.compatibility). Alembic is imported only for a migration: it takes nine megabytes, and a receiver only
asks which revisions exist.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import DBAPIError

from receiver.database.engine import sqlstate
from receiver.errors import ConfigurationError, Conflict

if TYPE_CHECKING:
    from alembic.config import Config

log: Final = structlog.get_logger(__name__)

# "redox-re" as a number: other programs do not lock it by accident.
_LOCK: Final = 0x7265646F782D7265
# How long a step waits for a table's lock: requests time out after four seconds.
LOCK_TIMEOUT: Final = 2.0
# How often a step is tried, and the pause between two tries, in which the feed runs.
ATTEMPTS: Final = 15
PAUSE: Final = 2.0
# How often to check whether another upgrade has ended.
_LOCK_POLL_INTERVAL: Final = 0.2
_LOCK_NOT_AVAILABLE: Final = "55P03"
# What the comment of alembic_version says: the oldest revision whose code still runs on the schema.
_MARK: Final = "oldest code: "

# How a revision file names itself and its predecessor.
_COMMENT: Final = re.compile(r"""^(revision|down_revision) = (?:None|["']([^"']+)["'])$""", re.MULTILINE)

# How receiver.storage.queue.partitions names them.
_PARTITION: Final = re.compile(r"_(?:default|\d{8}|\d{4}q[1-4])$")

_PACKAGE: Final = Path(__file__).resolve().parent.parent


def location() -> Path:
    """Return the folder of the revisions: inside the package in a wheel, next to it in the source tree."""
    inside = _PACKAGE / "migrations"
    return inside if inside.is_dir() else _PACKAGE.parent / "migrations"


def procrastinate_sql(version: str) -> str:
    """Return the tables and functions of that version of Procrastinate, as it publishes them (MIT)."""
    return (location() / f"procrastinate_{version}.sql").read_text()


def config(connection: Connection | None = None) -> Config:
    """Return Alembic's configuration, without a file."""
    from alembic.config import Config

    made = Config()
    made.set_main_option("script_location", str(location()).replace("%", "%%"))
    made.set_main_option("path_separator", "os")
    made.attributes["connection"] = connection
    return made


def head() -> str:
    """Return the revision that this code requires."""
    return _revisions(location())[0]


def known(revision: str) -> bool:
    """Return whether this code has that revision: its own, or an earlier one."""
    return revision in _revisions(location())


@cache
def _revisions(location: Path) -> tuple[str, ...]:
    """Return all revisions, the newest first."""
    after = {}
    for path in (location / "versions").glob("*.py"):
        fields = dict(_COMMENT.findall(path.read_text()))
        after[fields["down_revision"]] = fields["revision"]
    line = [after[""]]  # the first one has no predecessor
    while line[-1] in after:
        line.append(after[line[-1]])
    return tuple(reversed(line))


def current(connection: Connection) -> str | None:
    """Return the revision of the database, or None when it was never migrated."""
    if connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def oldest_code(connection: Connection) -> str | None:
    """Return the oldest revision whose code runs on the schema, as the last migration stored it; None if not stored."""
    comment = connection.scalar(text("SELECT obj_description(to_regclass('alembic_version'), 'pg_class')"))
    return comment.removeprefix(_MARK) if comment is not None and comment.startswith(_MARK) else None


def mark(connection: Connection, revision: str) -> None:
    """Store that code of `revision` is the oldest to run on the schema. Call it in the migration's transaction."""
    assert revision.isascii()
    assert "'" not in revision
    connection.execute(text(f"COMMENT ON TABLE alembic_version IS '{_MARK}{revision}'"))


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to `revision`. If several processes do this at once, one does it and the others wait.

    A schema that a newer release has upgraded is left as it is. Raises ConfigurationError when this code does not run
    on it; Conflict when a lock is not available, with its probable holder.
    """
    with engine.connect() as connection:
        found = current(connection)
        if found is not None and not known(found):
            if (oldest := oldest_code(connection)) is None or not known(oldest):
                raise ConfigurationError(
                    f"the schema is at revision {found}, of a newer release: install that one; "
                    f"this redox-receiver ({head()}) does not run on it"
                )
            return
    from alembic import command

    _retry_on_lock(engine, command.upgrade, revision)


def downgrade(engine: Engine, revision: str) -> None:
    """Take the schema back to `revision` ("base": remove everything of the receiver)."""
    from alembic import command

    _retry_on_lock(engine, command.downgrade, revision)


def _retry_on_lock(engine: Engine, step: Callable[[Config, str], None], revision: str) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _under_lock(engine, step, revision)
        except DBAPIError as exc:
            if sqlstate(exc) != _LOCK_NOT_AVAILABLE:
                raise
            if attempt == ATTEMPTS:
                raise Conflict(
                    f"a table is locked, and {ATTEMPTS} attempts did not get by{_holder(engine)}: end what "
                    "holds it, or wait for it, and try again; the feed was not held up"
                ) from exc
            log.warning("schema.locked", attempt=attempt, again_in=PAUSE)
            time.sleep(PAUSE)
        else:
            return


def _holder(engine: Engine) -> str:
    """Return the probable holder of a lock: the longest transaction."""
    with engine.connect() as connection:
        oldest = connection.execute(
            text(
                "SELECT pid, coalesce(nullif(application_name, ''), 'unnamed') AS name, "
                "(now() - xact_start)::text AS age FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid() "
                "AND xact_start IS NOT NULL ORDER BY xact_start LIMIT 1"
            )
        ).first()
    return "" if oldest is None else f" (the oldest transaction is of {oldest.name}, pid {oldest.pid}, {oldest.age})"


def _under_lock(engine: Engine, step: Callable[[Config, str], None], revision: str) -> None:
    """Hold the advisory lock on a separate connection: each step is its own transaction, and some use none.

    (CREATE INDEX CONCURRENTLY runs outside of a transaction.)
    """
    with engine.connect() as guard, engine.connect() as connection:
        # A transaction lock, not a session lock: it works through PgBouncer, and ends with the transaction. A
        # concurrent index build waits for every snapshot, so neither the holder of the lock nor those who wait for it
        # may keep one (a statement with parameters would leave its portal open, and its snapshot).
        while not guard.exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({_LOCK})").scalar():
            guard.rollback()
            time.sleep(_LOCK_POLL_INTERVAL)
        guard.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        event.listen(connection, "begin", _pause_before_retry)
        step(config(connection), revision)
        if current(connection) is None:
            connection.execute(text("DROP TABLE IF EXISTS alembic_version"))
        connection.commit()


def _pause_before_retry(connection: Connection) -> None:
    # For each transaction. Steps outside of a transaction (concurrent index builds) may wait: they block no writes.
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(LOCK_TIMEOUT * 1000)}")


def include_object(_object: Any, name: str | None, kind: str, _reflected: bool, _other: Any) -> bool:
    """Return whether Alembic compares the object: not partitions, which come and go."""
    return not (kind == "table" and name is not None and _PARTITION.search(name))
