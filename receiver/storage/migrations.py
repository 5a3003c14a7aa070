"""Moves the schema: `upgrade` under an advisory lock, and what stands now against what the code wants.

May not define tables (receiver.storage.schema) or steps (the revisions).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

# "redox-re" as a number: nobody else locks it by accident.
_LOCK: Final = 0x7265646F782D7265

_PACKAGE: Final = Path(__file__).resolve().parent.parent


def location() -> Path:
    """The folder of the revisions: inside the package when installed from a wheel, beside it in the source tree."""
    inside = _PACKAGE / "migrations"
    return inside if inside.is_dir() else _PACKAGE.parent / "migrations"


def procrastinate_sql(version: str) -> str:
    """The tables and functions of that version of Procrastinate, as it publishes them (MIT)."""
    return (location() / f"procrastinate_{version}.sql").read_text()


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration, without a file."""
    made = Config()
    made.set_main_option("script_location", str(location()).replace("%", "%%"))
    made.set_main_option("path_separator", "os")
    made.attributes["connection"] = connection
    return made


def head() -> str:
    """The revision that this code wants."""
    revision = ScriptDirectory.from_config(config()).get_current_head()
    assert revision is not None
    return revision


def current(connection: Connection) -> str | None:
    """The revision that the database is at, or None when it was never migrated."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to `revision`. Of several that do this at once, one does it and the others wait for it."""
    _under_lock(engine, command.upgrade, revision)


def downgrade(engine: Engine, revision: str) -> None:
    """Take the schema back to `revision` ("base": nothing of ours is left)."""
    _under_lock(engine, command.downgrade, revision)


def _under_lock(engine: Engine, step: Callable[[Config, str], None], revision: str) -> None:
    with engine.begin() as connection:
        # Of the transaction, not the session: it works through PgBouncer, and ends with whatever ends the transaction.
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        step(config(connection), revision)
        if current(connection) is None:
            connection.execute(text("DROP TABLE IF EXISTS alembic_version"))


def include_object(_object: Any, name: str | None, kind: str, _reflected: bool, _other: Any) -> bool:
    """What Alembic compares: not the payloads' partitions, which come and go."""
    return not (kind == "table" and name is not None and name.startswith("payloads_"))
