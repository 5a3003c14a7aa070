"""The look at the findings: by one host at a time, as conditions for notices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import structlog
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from receiver import findings
from receiver.database.engine import describe
from receiver.keyring import Keyring
from receiver.notices.plan import Condition

log: Final = structlog.get_logger(__name__)

_LOCK: Final = 0x6E6F7469636573  # "notices" as a number
DATABASE_UNAVAILABLE: Final = "database_unavailable"


class FindingsLook:
    """Returns the errors among the findings. For one thread.

    The host that holds an advisory lock of PostgreSQL looks, as long as its connection lasts; then another takes over.
    """

    def __init__(self, engine: Engine, keyring: Keyring, host: str) -> None:
        self._engine = engine
        self._keyring = keyring
        self._host = host
        self._leading: Connection | None = None
        self._last: Sequence[Condition] = ()

    def __call__(self) -> Sequence[Condition] | None:
        """Return the conditions that hold; None: another host looks.

        While the database does not answer, what was known before counts as lasting.
        """
        try:
            if self._leading is None and not self._lead():
                self._last = ()
                return None
            self._last = self._read()
        except SQLAlchemyError as exc:
            self._leave()
            return [
                *self._last,
                Condition(
                    code=DATABASE_UNAVAILABLE,
                    destination=None,
                    text=f"{self._host}: the database does not answer ({describe(exc)}), so messages are answered 503.",
                    fix="redox-receiver check",
                ),
            ]
        return self._last

    def _lead(self) -> bool:
        connection = self._engine.connect()
        try:
            leads = bool(connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _LOCK}))
            connection.rollback()
        except BaseException:
            connection.close()
            raise
        if leads:
            self._leading = connection
        else:
            connection.close()
        return leads

    def _read(self) -> Sequence[Condition]:
        assert self._leading is not None
        with self._leading.begin():
            found = findings.collect(findings.read(self._leading, self._keyring))
        return [
            Condition(code=each.code, destination=each.destination, text=each.text, fix=each.fix)
            for each in found
            if each.severity == "error"
        ]

    def _leave(self) -> None:
        if self._leading is not None:
            # Not back to the pool: its session may still hold the lock.
            self._leading.invalidate()
            self._leading.close()
            self._leading = None
