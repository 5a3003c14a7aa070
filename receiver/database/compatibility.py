"""Schema compatibility: whether this code can run on the current database schema.

A release upgrades the database first and its hosts one by one, so for a while older code works on a newer schema. Each
revision states the oldest code that can run on it (`oldest_code`, in migrations/script.py.mako), and stores that in the
database. Must not change the schema.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final, Literal

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from receiver.database import migrations
from receiver.database.engine import describe

log: Final = structlog.get_logger(__name__)

# How often the schema is checked, while waiting and while working.
SCHEMA_POLL_INTERVAL: Final = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemaCompatibility:
    """The schema's revision (None: never migrated) compared with the code's.

    level: the code's own · behind: older, upgrade needed · ahead: newer but compatible · beyond: newer and
    incompatible.
    """

    current: str | None
    wanted: str
    state: Literal["level", "behind", "ahead", "beyond"]

    @property
    def compatible(self) -> bool:
        """Return whether this code runs on the schema."""
        return self.state in ("level", "ahead")

    @property
    def message(self) -> str:
        """Return a sentence that says what is wrong and how to fix it."""
        match self.state:
            case "level":
                return f"at {self.current}"
            case "behind":
                return f"at {self.current or '(none)'}, behind {self.wanted}: run `redox-receiver db upgrade`"
            case "ahead":
                return (
                    f"at {self.current}, ahead of {self.wanted}, which still runs on it: install the release that "
                    "moved it"
                )
            case "beyond":
                return (
                    f"at {self.current}, too far ahead of {self.wanted}, which does not run on it: install the "
                    "release that moved it"
                )


def schema_compatibility(connection: Connection) -> SchemaCompatibility:
    """Compare the schema with the code. Raises SQLAlchemyError."""
    current, wanted = migrations.current(connection), migrations.head()
    state: Literal["level", "behind", "ahead", "beyond"] = "beyond"
    if current == wanted:
        state = "level"
    elif current is None or migrations.known(current):
        state = "behind"
    elif (oldest := migrations.oldest_code(connection)) is not None and migrations.known(oldest):
        state = "ahead"
    return SchemaCompatibility(current=current, wanted=wanted, state=state)


class SchemaMonitor:
    """Checks the schema repeatedly, and reports changes. Thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reported: str | None = None
        self._lock = threading.Lock()

    def check(self) -> SchemaCompatibility | None:
        """Return the schema's compatibility; None when the database is unavailable."""
        try:
            with self._engine.connect() as connection:
                found = schema_compatibility(connection)
        except SQLAlchemyError as exc:
            log.debug("schema.not_read", error=describe(exc))
            return None
        with self._lock:
            before, self._reported = self._reported, found.state
        if found.state != before:
            if not found.compatible:
                log.error("schema.does_not_fit", error=found.message)
            elif found.state == "ahead":
                log.warning("schema.ahead", error=found.message)
            elif before is not None:
                log.info("schema.fits", version=found.current)
        return found
