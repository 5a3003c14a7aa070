"""Restores a backup into an empty database, with PostgreSQL's own pg_restore, and puts the pending work on hold.

Must not restore a backup that is not proved (see receiver.storage.operations.backups).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, text

from receiver.errors import ConfigurationError, Conflict
from receiver.states import DeliveryState
from receiver.storage.operations.backups import DUMP, Backup
from receiver.storage.operations.postgres_programs import dump_contents, find_program, run_program, server_version
from receiver.storage.queue import outbox
from receiver.storage.registry.handler_changes import RESTORED

# How pg_restore lists the content of the table that holds the schema's revision, in whatever schema that is.
_REVISION_DATA: Final = re.compile(r" TABLE DATA \S+ alembic_version ")

_PAUSE_HANDLERS: Final = f"""
UPDATE subscriptions s SET paused_at = now(), pause_reason = :reason
FROM destinations t
WHERE t.id = s.destination_id AND s.paused_at IS NULL AND EXISTS (
    SELECT FROM deliveries d WHERE d.state = '{DeliveryState.PENDING}' AND NOT d.inline
      AND d.handler = s.handler AND d.destination_id = s.destination_id)
RETURNING s.handler, t.name AS destination"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoredWork:
    """What was put on hold: the handlers (handler, destination) with pending deliveries, and the number of requests."""

    handlers: tuple[tuple[str, str], ...]
    requests: int


def restore(engine: Engine, directory: Path, backup: Backup) -> RestoredWork:
    """Fill an empty database from a verified backup, all of it or nothing, and put its pending work on hold.

    A restored database does not know what has run or was sent since the backup. New messages wait behind the deliveries
    on hold, in order. Processes wait for the schema's revision, which is stored together with the hold: no worker can
    claim a delivery or a request in between. Call `migrations.upgrade` afterwards.

    If the role is a superuser, the restore runs as a temporary unprivileged role: the dump's SQL can then neither run a
    program on the server nor read its files. Raises Conflict when the database is not empty; ConfigurationError when
    pg_restore is missing, too old, or fails.
    """
    with engine.connect() as connection:
        if (there := _content(connection)) is not None:
            raise Conflict(
                f"the database is not empty (it holds {there}): restore into an empty one, that is another "
                "RECEIVER_DATA_DIR, or a new database in DATABASE_URL"
            )
        server = server_version(connection)
    program, _ = find_program("pg_restore", max(backup.pg_dump, server))
    contents = directory / "pg_restore.list"
    with _unprivileged(engine) as role:
        try:
            contents.write_text("".join(_without_revision(dump_contents(program, directory / DUMP))))
            run_program(
                [
                    program,
                    "--single-transaction",
                    "--exit-on-error",
                    "--no-owner",
                    "--no-privileges",
                    "--no-password",
                    f"--use-list={contents}",
                    str(directory / DUMP),
                ],
                engine,
                directory / "pg_restore.log",
                role=role,
            )
        finally:
            contents.unlink(missing_ok=True)
    return _hold(engine, backup.revision)


def _without_revision(contents: list[str]) -> list[str]:
    """Return the lines of a dump's contents without the schema's revision."""
    kept = [line for line in contents if _REVISION_DATA.search(line) is None]
    if len(kept) != len(contents) - 1:
        raise ConfigurationError("the dump does not hold exactly one revision of the schema: take another backup")
    return kept


def _hold(engine: Engine, revision: str) -> RestoredWork:
    """Hold the pending work and store the revision, in one transaction.

    The statements must run on the schema of every revision.
    """
    with engine.begin() as connection:
        handlers = connection.execute(text(_PAUSE_HANDLERS), {"reason": RESTORED}).all()
        connection.execute(text("UPDATE registry_version SET version = version + 1"))
        has_outbox = connection.scalar(text("SELECT to_regclass('outbound_requests') IS NOT NULL"))
        requests = outbox.hold(connection) if has_outbox else 0
        connection.execute(text("INSERT INTO alembic_version (version_num) VALUES (:revision)"), {"revision": revision})
    return RestoredWork(handlers=tuple((row.handler, row.destination) for row in handlers), requests=requests)


@contextmanager
def _unprivileged(engine: Engine) -> Iterator[tuple[str, str] | None]:
    """Yield a temporary role and its password, which may fill only this database. Its objects become the caller's at
    the end.

    Yields None if the caller's role is not a superuser: it is used as it is.
    """
    with engine.connect() as connection:
        ours, privileged = connection.execute(
            text("SELECT quote_ident(current_user), rolsuper FROM pg_roles WHERE rolname = current_user")
        ).one()
    if not privileged:
        yield None
        return
    name, password = f"redox_restore_{secrets.token_hex(4)}", secrets.token_urlsafe(24)
    with engine.begin() as connection:
        database = connection.scalar(text("SELECT quote_ident(current_database())"))
        connection.execute(
            text(
                f"CREATE ROLE {name} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT NOREPLICATION "
                f"CONNECTION LIMIT 4 PASSWORD '{password}'"
            )
        )
        connection.execute(text(f"GRANT CONNECT, CREATE, TEMPORARY ON DATABASE {database} TO {name}"))
        if connection.scalar(text("SELECT to_regnamespace('public') IS NOT NULL")):
            connection.execute(text(f"GRANT USAGE, CREATE ON SCHEMA public TO {name}"))
    try:
        yield name, password
    finally:
        with engine.begin() as connection:
            connection.execute(text(f"REASSIGN OWNED BY {name} TO {ours}"))
            connection.execute(text(f"DROP OWNED BY {name}"))
            connection.execute(text(f"DROP ROLE {name}"))


def _content(connection: Connection) -> str | None:
    """Return the name of an existing table, view or sequence; None if the database is empty."""
    name: str | None = connection.scalar(
        text(
            "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' ORDER BY 1 LIMIT 1"
        )
    )
    return name
